/*
 * One-sided operations over an ordered byte stream, for media that have none of their own (tcp; later dpdk).
 * Pure: no I/O, no clock, no randomness of its own; bytes and random numbers come in as arguments.
 *
 *   frames  what follows one another on the stream: a header, its payload, then zero bytes up to the next multiple of
 *           8, so that headers and the payload of messages are always aligned in the receiver's memory. The zeros
 *           travel in front of the next header, never behind a payload: nobody waits for them.
 *   keys    a table of the memory that a peer may touch. A key is (slot, epoch, nonce): the epoch tells a key that has
 *           expired from one that never was, the nonce (64 random bits) makes guessing pointless.
 *
 * Who receives a WRITE, a WRITE_IMM or a READ_REQ resolves its key before the first byte moves: a refused operation
 * never changes memory. A refused read is answered by READ_NACK and the stream goes on. A refused write is answered by
 * REFUSED and the stream ends, because a message behind it would claim that its bytes are there.
 */
#ifndef DJINN_TRANSPORT_SOFTRMA_H
#define DJINN_TRANSPORT_SOFTRMA_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "transport.h"

/* ---- frames ---- */

enum softrma_kind {
        SOFTRMA_MSG = 1,   /* payload: the message */
        SOFTRMA_WRITE,     /* payload: the bytes for (key, off) */
        SOFTRMA_WRITE_IMM, /* likewise, and the receiver's event carries imm */
        SOFTRMA_READ_REQ,  /* no payload; len bytes of (key, off) are wanted; imm is the reader's tag */
        SOFTRMA_READ_RESP, /* payload: the bytes wanted; imm is the tag */
        SOFTRMA_READ_NACK, /* no payload; len is the positive errno; imm is the tag */
        SOFTRMA_REFUSED,   /* no payload; len is the positive errno; the last frame of its sender */
        SOFTRMA_KINDS
};

#define SOFTRMA_HEAD_MIN 16 /* MSG, READ_RESP, READ_NACK, REFUSED */
#define SOFTRMA_HEAD_MAX 40 /* those that carry a key */
#define SOFTRMA_ALIGN    8
#define SOFTRMA_BULK_MAX ((uint64_t)1 << 40) /* bytes in one write or read */

struct softrma_frame {
        enum softrma_kind kind;
        uint32_t imm;
        uint64_t len;
        uint32_t key_id, key_epoch;
        uint64_t key_nonce;
        uint64_t off; /* bytes from the start of what the key opens */
};

/* Bytes of a header of this kind; 0 for a kind that does not exist. */
size_t softrma_head_bytes(unsigned kind);
/* Bytes behind the header on the stream. */
static inline uint64_t softrma_payload_bytes(const struct softrma_frame *f)
{
        return f->kind <= SOFTRMA_WRITE_IMM || f->kind == SOFTRMA_READ_RESP ? f->len : 0;
}

static inline unsigned softrma_pad(uint64_t payload_bytes)
{
        return (unsigned)(-payload_bytes & (SOFTRMA_ALIGN - 1));
}

/* Writes the header; returns its bytes. */
size_t softrma_pack(const struct softrma_frame *f, uint8_t out[SOFTRMA_HEAD_MAX]);
/* Reads and validates a header: its bytes, 0 when more than have bytes are needed, or -EPROTO (sentence set) for
 * anything that softrma_pack would not have written or that is over the limits. msg_max: longest message taken. */
int softrma_unpack(const uint8_t *bytes, size_t have, size_t msg_max, struct softrma_frame *out);

/* Messages, the kind whose latency is looked at, without a call: their header is one known word and a length. */
#define SOFTRMA_MAGIC    0x4a44u /* "DJ" */
#define SOFTRMA_MSG_WORD ((uint64_t)SOFTRMA_MAGIC | (uint64_t)SOFTRMA_MSG << 16)

static inline void softrma_pack_msg(uint64_t len, uint8_t out[SOFTRMA_HEAD_MIN])
{
        uint64_t w[2] = {htole64(SOFTRMA_MSG_WORD), htole64(len)};

        memcpy(out, w, sizeof(w));
}

/* Whether a message that softrma_unpack would take begins here; its header has SOFTRMA_HEAD_MIN bytes. */
static inline bool softrma_is_msg(const uint8_t *bytes, size_t have, size_t msg_max, uint64_t *len)
{
        uint64_t w[2];

        if (have < sizeof(w))
                return false;
        memcpy(w, bytes, sizeof(w));
        *len = le64toh(w[1]);
        return le64toh(w[0]) == SOFTRMA_MSG_WORD && *len <= msg_max;
}

/* ---- keys ---- */

#define SOFTRMA_KEYS_MAX 65536u /* live keys in one table */

struct softrma_slot {
        uint8_t *addr;
        uint64_t len, nonce;
        const void *owner; /* what the key dies with; NULL: the slot is free */
        uint32_t epoch, next_free;
};

struct softrma_table {
        struct softrma_slot *slots;
        uint32_t n, used, free;
};

/* Opens [addr, addr+len) for the peer until softrma_revoke(owner). nonce: 64 random bits, new for each call.
 * session: tells whose key it is (softrma_key_read). 0; -ENOSPC, -ENOMEM with a sentence. Set-up: may allocate. */
int softrma_export(struct softrma_table *t, void *addr, uint64_t len, const void *owner, uint64_t nonce,
                   uint64_t session, struct tp_key *out);
/* Every key of this owner dies now. */
void softrma_revoke(struct softrma_table *t, const void *owner);
void softrma_table_free(struct softrma_table *t);

/* Where f's key and offset lead: 0 and the address, -EACCES: no such key, -ESTALE: it has expired, -ERANGE: f.off and
 * len lead out of it. No sentence: the caller knows the peer. */
int softrma_resolve(const struct softrma_table *t, const struct softrma_frame *f, uint64_t off, uint64_t len,
                    uint8_t **addr, const void **owner);

/* The key as its importer sees it. -EACCES with a sentence when it is not a key of the peer whose session this is. */
struct softrma_key {
        uint32_t id, epoch;
        uint64_t nonce, len;
};

int softrma_key_read(const struct tp_key *key, uint64_t session, struct softrma_key *out);

#endif
