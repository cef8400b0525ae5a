package policy

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/token"
)

// A policy needs rules, a list of mappings, each with lists: one level more is
// allowed than that, in brackets and in dashes of one line. goccy/go-yaml
// v1.19.2 takes minutes over tens of thousands of levels.
const (
	maxFlow   = 4
	maxDashes = 2
	// maxError bounds what is quoted of a file in an error, in bytes.
	maxError = 1000
)

// foreign are the parts of YAML that a policy has no use for, and that say
// something else than they seem to or cost far more than their length: goccy
// expands aliases without bound.
var foreign = []token.Type{
	token.AnchorType, token.AliasType, token.MergeKeyType, token.TagType,
	token.MappingKeyType, token.DirectiveType,
}

// numbers would be decoded, and come back as another text: 1.10 as "1.1", 007 as "7".
var numbers = []token.Type{
	token.IntegerType, token.BinaryIntegerType, token.OctetIntegerType, token.HexIntegerType,
	token.FloatType, token.InfinityType, token.NanType,
}

// decodeFile reads the one YAML document in source; one without content leaves
// f as it is. Errors name the line.
func decodeFile(source []byte, f *file) error {
	tokens := slices.DeleteFunc(lexer.Tokenize(string(source)), func(t *token.Token) bool { return t.Type == token.CommentType })
	if err := checkTokens(tokens); err != nil {
		return err
	}
	err := yaml.UnmarshalWithOptions(source, f, yaml.Strict())
	if err != nil {
		text := yaml.FormatError(err, false, true)
		if len(text) > maxError {
			text = yaml.FormatError(err, false, false)
		}
		return errors.New(strings.ToValidUTF8(text[:min(len(text), maxError)], ""))
	}
	return nil
}

// checkTokens refuses, before anything is built of it, what would be read
// otherwise than a person reads it.
func checkTokens(tokens token.Tokens) error {
	flow, dashes, dashLine := 0, 0, 0
	for i, t := range tokens {
		line := t.Position.Line
		switch {
		case slices.Contains(foreign, t.Type):
			return fmt.Errorf("line %d: anchors, aliases, tags, '?', '<<' and '%%' have no place in a policy", line)
		case slices.Contains(numbers, t.Type) && !isWeight(tokens, i):
			return fmt.Errorf("line %d: put %.40q in quotes: it is a name, and would be read as a number", line, t.Value)
		case t.Type == token.NullType:
			return fmt.Errorf("line %d: %.40q is no value; leave the field out", line, t.Value)
		case t.Type == token.DocumentHeaderType && i > 0,
			t.Type == token.DocumentEndType && i+1 < len(tokens):
			return fmt.Errorf("line %d: a second YAML document begins", line)
		case t.Type == token.SequenceStartType, t.Type == token.MappingStartType:
			flow++
		case t.Type == token.SequenceEndType, t.Type == token.MappingEndType:
			flow--
		case t.Type == token.SequenceEntryType:
			if line != dashLine {
				dashes, dashLine = 0, line
			}
			dashes++
		case t.Type == token.MappingValueType && i > 0 && tokens[i-1].Value != "rules" && valueless(tokens, i):
			return fmt.Errorf("line %d: %.40q has no value; leave the field out", line, tokens[i-1].Value)
		}
		if flow > maxFlow || dashes > maxDashes {
			return fmt.Errorf("line %d: too many levels", line)
		}
	}
	return nil
}

// isWeight reports whether tokens[i] is a weight, the only number that is one,
// written as people write it.
func isWeight(tokens token.Tokens, i int) bool {
	return i >= 2 && tokens[i].Type == token.IntegerType && tokens[i-1].Type == token.MappingValueType && tokens[i-2].Value == "weight"
}

// valueless reports whether nothing follows the ':' at i > 0: left to itself, an
// empty not_after would be a rule that never ends.
func valueless(tokens token.Tokens, i int) bool {
	if i+1 == len(tokens) {
		return true
	}
	key, next := tokens[i-1].Position, tokens[i+1]
	switch next.Type {
	case token.CollectEntryType, token.MappingEndType, token.SequenceEndType, token.DocumentHeaderType, token.DocumentEndType:
		return true
	case token.SequenceEntryType: // may stand below its key, not left of it
		return next.Position.Column < key.Column
	}
	return next.Position.Line > key.Line && next.Position.Column <= key.Column
}
