// A member of a meshnode network in JavaScript, written from the protocols/ folder alone.
//
//     node peer.mjs KEY_HEX     joins as JSON commands on standard input say, one a line, and tells
//                               what happens as JSON events on standard output, until input ends
//
// Commands, by "do": dial {addr}; ping {peer}; tunnel {peer, service, data}. Data is base64. Each is
// answered by one event of the same name, with "error" if it failed. Told unasked: ready, found,
// member, refused.
import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { mdns } from '@libp2p/mdns'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { byteStream } from '@libp2p/utils'
import { decode, encode } from '@msgpack/msgpack'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const MEMBERSHIP = '/meshnode/membership/1.0.0'
const TUNNEL = '/meshnode/tunnel/2.0.0'
const [END, HEADER, MAX_CHUNK] = [0x0000, 0xffff, 65505]
const PATIENCE = 10_000

const key = Buffer.from(process.argv[2], 'hex')
const mac = (label, ...rest) => {
  const hmac = createHmac('sha256', key).update(label)
  for (const part of rest) hmac.update(part)
  return hmac.digest()
}
const keyId = mac('meshnode key id 1').subarray(0, 8)
const fingerprint = mac('meshnode network fingerprint 1').toString('hex').slice(0, 16)
const tell = (event, fields = {}) => console.log(JSON.stringify({ event, ...fields }))

const writeFrame = async (bytes, value) => {
  const body = encode(value)
  const length = Buffer.alloc(4)
  length.writeUInt32BE(body.length)
  await bytes.write(Buffer.concat([length, body]))
}
const readExactly = async (bytes, count) =>
  Buffer.from((await bytes.read({ bytes: count, signal: AbortSignal.timeout(PATIENCE) })).subarray())
const readFrame = async (bytes) => decode(await readExactly(bytes, (await readExactly(bytes, 4)).readUInt32BE()))

const transcript = (dialler, listener, nonceD, nonceL) =>
  Buffer.concat([dialler, listener, nonceD, nonceL].flatMap((part) => {
    const length = Buffer.alloc(2)
    length.writeUInt16BE(part.length)
    return [length, Buffer.from(part)]
  }))

// What mDNS itself finds: the node's own discovery event also fires, without addresses, for one that
// dialled us first.
const discovery = (components) => {
  const found = mdns({ serviceTag: `_p2p-${fingerprint}._udp.local`, interval: 1000 })(components)
  found.addEventListener('peer', ({ detail }) => {
    tell('found', { peer: detail.id.toString(), addrs: detail.multiaddrs.map(String) })
  })
  return found
}

const node = await createLibp2p({
  addresses: { listen: ['/ip4/0.0.0.0/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  peerDiscovery: [discovery],
  services: { identify: identify(), ping: ping() },
  connectionManager: { autoDial: false }
})

const proveAsDialler = async (connection) => {
  const stream = await connection.newStream(MEMBERSHIP)
  const bytes = byteStream(stream)
  const nonce = randomBytes(32)
  await writeFrame(bytes, { Type: 'hello', Nonce: nonce, KeyIDs: [keyId] })
  const got = await readFrame(bytes)
  if (got.Type === 'refusal') throw new Error(`refused: ${got.Code}`)
  const said = transcript(
    Buffer.from(node.peerId.toString()), Buffer.from(connection.remotePeer.toString()), nonce, got.Nonce
  )
  if (!timingSafeEqual(Buffer.from(got.Proof), mac('meshnode membership 1 listener', said))) {
    throw new Error('the listener does not hold the key')
  }
  await writeFrame(bytes, { Type: 'proof', Proof: mac('meshnode membership 1 dialler', said) })
  const last = await readFrame(bytes)
  if (last.Type !== 'welcome') throw new Error(`refused: ${last.Code ?? last.Type}`)
  await stream.close()
}

await node.handle(MEMBERSHIP, async (stream, connection) => {
  const peer = connection.remotePeer.toString()
  const bytes = byteStream(stream)
  try {
    const hello = await readFrame(bytes)
    if (!hello.KeyIDs.some((named) => keyId.equals(Buffer.from(named)))) {
      await writeFrame(bytes, { Type: 'refusal', Code: 'wrong_token', Message: 'no common key' })
      throw new Error('wrong_token')
    }
    const nonce = randomBytes(32)
    const said = transcript(Buffer.from(peer), Buffer.from(node.peerId.toString()), hello.Nonce, nonce)
    const proof = mac('meshnode membership 1 listener', said)
    await writeFrame(bytes, { Type: 'challenge', Nonce: nonce, KeyID: keyId, Proof: proof })
    const got = await readFrame(bytes)
    if (got.Type !== 'proof' || !timingSafeEqual(Buffer.from(got.Proof), mac('meshnode membership 1 dialler', said))) {
      throw new Error(`refused: ${got.Code ?? got.Type}`)
    }
    await writeFrame(bytes, { Type: 'welcome' })
    tell('member', { peer })
    await stream.close()
  } catch (error) {
    tell('refused', { peer, error: error.message })
    await stream.close()
  }
})

const connectionTo = (peer) => node.getConnections().find((c) => c.remotePeer.toString() === peer)

const tunnel = async ({ peer, service, data }) => {
  const stream = await connectionTo(peer).newStream(TUNNEL)
  const bytes = byteStream(stream)
  const mark = (value) => Buffer.from([value >> 8, value & 0xff])
  await bytes.write(mark(HEADER))
  await writeFrame(bytes, { ServiceID: service })
  if ((await readExactly(bytes, 2)).readUInt16BE() !== HEADER) throw new Error('no reply')
  const reply = await readFrame(bytes)
  if (reply.Status !== 'ok') return { status: reply.Status }
  const body = Buffer.from(data, 'base64')
  for (let start = 0; start < body.length; start += MAX_CHUNK) {
    const chunk = body.subarray(start, start + MAX_CHUNK)
    await bytes.write(Buffer.concat([mark(chunk.length), chunk]))
  }
  await bytes.write(mark(END))
  const parts = []
  for (;;) {
    const size = (await readExactly(bytes, 2)).readUInt16BE()
    if (size === END) break
    parts.push(await readExactly(bytes, size))
  }
  await stream.close()
  return { status: 'ok', answer: Buffer.concat(parts).toString() }
}

const commands = {
  dial: async ({ addr }) => {
    const connection = await node.dial(multiaddr(addr), { signal: AbortSignal.timeout(PATIENCE) })
    await proveAsDialler(connection)
    return { peer: connection.remotePeer.toString() }
  },
  ping: async ({ peer }) => {
    // Not the library's own, which waits for ever when the answer and the end come in one packet.
    const stream = await connectionTo(peer).newStream('/ipfs/ping/1.0.0')
    const bytes = byteStream(stream)
    const [sent, began] = [randomBytes(32), Date.now()]
    await bytes.write(sent)
    if (!sent.equals(await readExactly(bytes, 32))) throw new Error('another answer')
    await stream.close()
    return { rtt_ms: Date.now() - began }
  },
  tunnel
}

tell('ready', {
  peer: node.peerId.toString(),
  addr: String(node.getMultiaddrs().find((addr) => !String(addr).startsWith('/ip4/127.')) ?? node.getMultiaddrs()[0])
})
for await (const line of createInterface({ input: process.stdin })) {
  const { do: what, ...fields } = JSON.parse(line)
  try {
    tell(what, await commands[what](fields))
  } catch (error) {
    tell(what, { error: `${error.name}: ${error.message}` })
  }
}
await node.stop()
process.exit(0)
