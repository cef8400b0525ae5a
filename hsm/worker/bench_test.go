package worker_test

const rawCommand = "test-raw"

func rawSigner() int { return 1 }
