package main

// protocols/membership/1.0.0

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/vmihailenco/msgpack/v5"
)

const (
	membershipID      = protocol.ID("/meshnode/membership/1.0.0")
	membershipTimeout = 3 * time.Second
	maxMembershipBody = 2048
)

type message struct {
	Type    string   `msgpack:"Type"`
	Nonce   []byte   `msgpack:"Nonce,omitempty"`
	KeyIDs  [][]byte `msgpack:"KeyIDs,omitempty"`
	KeyID   []byte   `msgpack:"KeyID,omitempty"`
	Proof   []byte   `msgpack:"Proof,omitempty"`
	Code    string   `msgpack:"Code,omitempty"`
	Message string   `msgpack:"Message,omitempty"`
}

func writeFrame(w io.Writer, value any) error {
	body, err := msgpack.Marshal(value)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

func readFrame(r io.Reader, limit uint32, value any) error {
	var length uint32
	if err := binary.Read(r, binary.BigEndian, &length); err != nil {
		return err
	}
	if length > limit {
		return fmt.Errorf("too_large: %d bytes", length)
	}
	body := make([]byte, length)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	return msgpack.Unmarshal(body, value)
}

func mac(key []byte, label string, rest []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(label))
	h.Write(rest)
	return h.Sum(nil)
}

func keyID(key []byte) []byte { return mac(key, "meshnode key id 1", nil)[:8] }

func transcript(dialler, listener peer.ID, nonceD, nonceL []byte) []byte {
	var out []byte
	for _, part := range [][]byte{[]byte(dialler.String()), []byte(listener.String()), nonceD, nonceL} {
		out = binary.BigEndian.AppendUint16(out, uint16(len(part)))
		out = append(out, part...)
	}
	return out
}

func newNonce() []byte {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce)
	return nonce
}

func refusal(got message) error { return fmt.Errorf("refused: %s: %s", got.Code, got.Message) }

func (m *meshPeer) proveAsDialler(ctx context.Context, id peer.ID) error {
	stream, err := m.host.NewStream(ctx, id, membershipID)
	if err != nil {
		return err
	}
	defer stream.Close()
	_ = stream.SetDeadline(time.Now().Add(membershipTimeout))
	nonce := newNonce()
	if err := writeFrame(stream, message{Type: "hello", Nonce: nonce, KeyIDs: [][]byte{keyID(m.key)}}); err != nil {
		return err
	}
	var got message
	if err := readFrame(stream, maxMembershipBody, &got); err != nil {
		return err
	}
	if got.Type == "refusal" {
		return refusal(got)
	}
	said := transcript(m.host.ID(), id, nonce, got.Nonce)
	if got.Type != "challenge" || !hmac.Equal(got.Proof, mac(m.key, "meshnode membership 1 listener", said)) {
		_ = writeFrame(stream, message{Type: "refusal", Code: "wrong_token"})
		return errors.New("the listener does not hold the key")
	}
	proof := mac(m.key, "meshnode membership 1 dialler", said)
	if err := writeFrame(stream, message{Type: "proof", Proof: proof}); err != nil {
		return err
	}
	var last message
	if err := readFrame(stream, maxMembershipBody, &last); err != nil {
		return err
	}
	if last.Type == "refusal" {
		return refusal(last)
	}
	if last.Type != "welcome" {
		return fmt.Errorf("unexpected_message: %s", last.Type)
	}
	return nil
}

func (m *meshPeer) answerMembership(stream network.Stream) {
	id := stream.Conn().RemotePeer()
	err := m.proveAsListener(stream, id)
	if err == nil {
		_ = stream.Close()
		m.admit(id)
		return
	}
	tell("refused", map[string]any{"peer": id.String(), "error": err.Error()})
	_ = stream.CloseWrite()
	_ = stream.SetReadDeadline(time.Now().Add(time.Second))
	_, _ = io.Copy(io.Discard, stream) // until it has read why
	_ = stream.Conn().Close()
}

func (m *meshPeer) proveAsListener(stream network.Stream, id peer.ID) error {
	_ = stream.SetDeadline(time.Now().Add(membershipTimeout))
	var hello message
	if err := readFrame(stream, maxMembershipBody, &hello); err != nil {
		return err
	}
	if hello.Type != "hello" {
		return fmt.Errorf("unexpected_message: %s", hello.Type)
	}
	common := false
	for _, named := range hello.KeyIDs {
		common = common || hmac.Equal(named, keyID(m.key))
	}
	if !common {
		_ = writeFrame(stream, message{Type: "refusal", Code: "wrong_token", Message: "no common key"})
		return errors.New("wrong_token: no common key")
	}
	nonce := newNonce()
	said := transcript(id, m.host.ID(), hello.Nonce, nonce)
	challenge := message{
		Type: "challenge", Nonce: nonce, KeyID: keyID(m.key),
		Proof: mac(m.key, "meshnode membership 1 listener", said),
	}
	if err := writeFrame(stream, challenge); err != nil {
		return err
	}
	var proof message
	if err := readFrame(stream, maxMembershipBody, &proof); err != nil {
		return err
	}
	if proof.Type == "refusal" {
		return refusal(proof)
	}
	if !hmac.Equal(proof.Proof, mac(m.key, "meshnode membership 1 dialler", said)) {
		_ = writeFrame(stream, message{Type: "refusal", Code: "wrong_token", Message: "the proof is wrong"})
		return errors.New("wrong_token: the proof is wrong")
	}
	return writeFrame(stream, message{Type: "welcome"})
}
