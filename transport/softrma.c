#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "err.h"
#include "prng.h"
#include "softrma.h"

#define KEY_MAGIC 0x314b5253u /* "SRK1" */

/* The header as it stands on the stream: little endian; short kinds end before key_id. */
struct wire_head {
        uint16_t magic;
        uint8_t kind, zero;
        uint32_t imm;
        uint64_t len;
        uint32_t key_id, key_epoch;
        uint64_t key_nonce, off;
};

static_assert(offsetof(struct wire_head, kind) == 2, "wire layout");
static_assert(offsetof(struct wire_head, imm) == 4, "wire layout");
static_assert(offsetof(struct wire_head, len) == 8, "wire layout");
static_assert(offsetof(struct wire_head, key_id) == SOFTRMA_HEAD_MIN, "wire layout");
static_assert(offsetof(struct wire_head, key_epoch) == 20, "wire layout");
static_assert(offsetof(struct wire_head, key_nonce) == 24, "wire layout");
static_assert(offsetof(struct wire_head, off) == 32, "wire layout");
static_assert(sizeof(struct wire_head) == SOFTRMA_HEAD_MAX, "wire layout");
static_assert(SOFTRMA_HEAD_MIN % SOFTRMA_ALIGN == 0 && SOFTRMA_HEAD_MAX % SOFTRMA_ALIGN == 0, "payload is aligned");

struct wire_key {
        uint32_t magic, id, epoch, zero;
        uint64_t nonce, len, session;
        uint64_t zeros[2];
        uint64_t seal; /* over all before it: finds damage; the right of access is the nonce's business */
};

static_assert(offsetof(struct wire_key, nonce) == 16, "wire layout");
static_assert(offsetof(struct wire_key, session) == 32, "wire layout");
static_assert(offsetof(struct wire_key, seal) == TP_KEY_BYTES - 8, "wire layout");
static_assert(sizeof(struct wire_key) == TP_KEY_BYTES, "wire layout");

/* What each kind may be: head 0 marks a kind that does not exist. */
static const struct kind_rule {
        uint8_t head;
        bool imm;      /* the field has a meaning; where it has none it is zero */
        bool is_errno; /* len is an errno */
} kind_rules[SOFTRMA_KINDS] = {
    [SOFTRMA_MSG] = {SOFTRMA_HEAD_MIN, false, false},      [SOFTRMA_WRITE] = {SOFTRMA_HEAD_MAX, false, false},
    [SOFTRMA_WRITE_IMM] = {SOFTRMA_HEAD_MAX, true, false}, [SOFTRMA_READ_REQ] = {SOFTRMA_HEAD_MAX, true, false},
    [SOFTRMA_READ_RESP] = {SOFTRMA_HEAD_MIN, true, false}, [SOFTRMA_READ_NACK] = {SOFTRMA_HEAD_MIN, true, true},
    [SOFTRMA_REFUSED] = {SOFTRMA_HEAD_MIN, false, true},
};

size_t softrma_head_bytes(unsigned kind)
{
        return kind < SOFTRMA_KINDS ? kind_rules[kind].head : 0;
}

size_t softrma_pack(const struct softrma_frame *f, uint8_t out[SOFTRMA_HEAD_MAX])
{
        struct wire_head h = {
            .magic = htole16(SOFTRMA_MAGIC),
            .kind = (uint8_t)f->kind,
            .imm = htole32(f->imm),
            .len = htole64(f->len),
        };

        if (kind_rules[f->kind].head == SOFTRMA_HEAD_MIN) {
                memcpy(out, &h, SOFTRMA_HEAD_MIN);
                return SOFTRMA_HEAD_MIN;
        }
        h.key_id = htole32(f->key_id);
        h.key_epoch = htole32(f->key_epoch);
        h.key_nonce = htole64(f->key_nonce);
        h.off = htole64(f->off);
        memcpy(out, &h, SOFTRMA_HEAD_MAX);
        return SOFTRMA_HEAD_MAX;
}

static bool errno_allowed(uint64_t e)
{
        return e == EACCES || e == ESTALE || e == ERANGE;
}

static int frame_check(const struct softrma_frame *f, size_t msg_max)
{
        const struct kind_rule *rule = &kind_rules[f->kind];

        if (!rule->imm && f->imm)
                return err_set(-EPROTO, "a frame of kind %u has %u where 0 was expected", (unsigned)f->kind, f->imm);
        if (rule->is_errno && !errno_allowed(f->len))
                return err_set(-EPROTO, "a refusal names the unknown reason %llu", (unsigned long long)f->len);
        if (f->kind == SOFTRMA_MSG && f->len > msg_max)
                return err_set(-EPROTO, "a message of %llu bytes is longer than the %zu agreed on",
                               (unsigned long long)f->len, msg_max);
        if (f->len > SOFTRMA_BULK_MAX)
                return err_set(-EPROTO, "a bulk frame of %llu bytes is beyond every limit", (unsigned long long)f->len);
        return 0;
}

int softrma_unpack(const uint8_t *bytes, size_t have, size_t msg_max, struct softrma_frame *out)
{
        struct wire_head h;
        size_t head;
        int rc;

        if (have < SOFTRMA_HEAD_MIN)
                return 0;
        memcpy(&h, bytes, SOFTRMA_HEAD_MIN);
        head = softrma_head_bytes(h.kind);
        if (le16toh(h.magic) != SOFTRMA_MAGIC || !head || h.zero)
                return err_set(-EPROTO, "bytes %02x %02x %02x %02x are no frame header", bytes[0], bytes[1], bytes[2],
                               bytes[3]);
        *out = (struct softrma_frame){.kind = h.kind, .imm = le32toh(h.imm), .len = le64toh(h.len)};
        rc = frame_check(out, msg_max);
        if (rc < 0)
                return rc;
        if (head == SOFTRMA_HEAD_MIN)
                return SOFTRMA_HEAD_MIN;
        if (have < head)
                return 0;
        memcpy(&h, bytes, sizeof(h));
        out->key_id = le32toh(h.key_id);
        out->key_epoch = le32toh(h.key_epoch);
        out->key_nonce = le64toh(h.key_nonce);
        out->off = le64toh(h.off);
        return SOFTRMA_HEAD_MAX;
}

/* ---- keys ---- */

static uint64_t key_seal(const struct wire_key *w)
{
        uint64_t words[offsetof(struct wire_key, seal) / 8], seal = 0;

        memcpy(words, w, sizeof(words));
        for (size_t i = 0; i < ARRAY_LEN(words); i++)
                seal = prng_at(seal, le64toh(words[i]), i);
        return seal;
}

static int table_grow(struct softrma_table *t)
{
        uint32_t n = t->n ? t->n * 2 : 64;
        struct softrma_slot *slots;

        if (t->n >= SOFTRMA_KEYS_MAX)
                return err_set(-ENOSPC, "more than %u memory keys for one connection", SOFTRMA_KEYS_MAX);
        slots = realloc(t->slots, n * sizeof(*slots));
        if (!slots)
                return err_set(-ENOMEM, "no memory for %u memory keys", n);
        for (uint32_t i = t->n; i < n; i++)
                slots[i] = (struct softrma_slot){.next_free = i + 1};
        t->slots = slots;
        t->free = t->n;
        t->n = n;
        return 0;
}

int softrma_export(struct softrma_table *t, void *addr, uint64_t len, const void *owner, uint64_t nonce,
                   uint64_t session, struct tp_key *out)
{
        struct softrma_slot *s;
        struct wire_key w;
        uint32_t id;
        int rc;

        if (t->used == t->n && (rc = table_grow(t)) < 0)
                return rc;
        id = t->free;
        s = &t->slots[id];
        t->free = s->next_free;
        t->used++;
        s->addr = addr;
        s->len = len;
        s->nonce = nonce;
        s->owner = owner;
        w = (struct wire_key){
            .magic = htole32(KEY_MAGIC),
            .id = htole32(id),
            .epoch = htole32(s->epoch),
            .nonce = htole64(nonce),
            .len = htole64(len),
            .session = htole64(session),
        };
        w.seal = htole64(key_seal(&w));
        memcpy(out->bytes, &w, sizeof(w));
        return 0;
}

void softrma_revoke(struct softrma_table *t, const void *owner)
{
        for (uint32_t i = 0; i < t->n; i++) {
                struct softrma_slot *s = &t->slots[i];

                if (s->owner != owner || !owner)
                        continue;
                *s = (struct softrma_slot){.epoch = s->epoch + 1, .next_free = t->free};
                t->free = i;
                t->used--;
        }
}

void softrma_table_free(struct softrma_table *t)
{
        free(t->slots);
        *t = (struct softrma_table){0};
}

int softrma_resolve(const struct softrma_table *t, const struct softrma_frame *f, uint64_t off, uint64_t len,
                    uint8_t **addr, const void **owner)
{
        const struct softrma_slot *s;

        if (f->key_id >= t->n)
                return -EACCES;
        s = &t->slots[f->key_id];
        if (f->key_epoch < s->epoch)
                return -ESTALE;
        if (f->key_epoch > s->epoch || !s->owner || s->nonce != f->key_nonce)
                return -EACCES;
        if (off > s->len || len > s->len - off)
                return -ERANGE;
        *addr = s->addr + off;
        *owner = s->owner;
        return 0;
}

int softrma_key_read(const struct tp_key *key, uint64_t session, struct softrma_key *out)
{
        struct wire_key w;

        memcpy(&w, key->bytes, sizeof(w));
        if (le32toh(w.magic) != KEY_MAGIC || le64toh(w.seal) != key_seal(&w))
                return err_set(-EACCES, "these %u bytes are no memory key of this transport, or a damaged one",
                               TP_KEY_BYTES);
        if (le64toh(w.session) != session)
                return err_set(-EACCES, "the memory key was made for another connection");
        *out = (struct softrma_key){
            .id = le32toh(w.id),
            .epoch = le32toh(w.epoch),
            .nonce = le64toh(w.nonce),
            .len = le64toh(w.len),
        };
        return 0;
}
