package pinrecord

// A hash takes seconds under the race detector.
func init() { scryptN = 1 << 10 }
