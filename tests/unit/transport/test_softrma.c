/* softrma: headers that lie, keys that are guessed, expired or stretched. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>
#include <errno.h>

#include "err.h"
#include "prng.h"
#include "softrma.h"

#define MSG_MAX 65536

static const struct softrma_frame samples[] = {
    {.kind = SOFTRMA_MSG, .len = 300},
    {.kind = SOFTRMA_MSG, .len = 0},
    {.kind = SOFTRMA_WRITE, .len = 1 << 20, .key_id = 7, .key_epoch = 3, .key_nonce = 0x123456789abcdef0, .off = 9},
    {.kind = SOFTRMA_WRITE_IMM, .imm = 0xfeedf00d, .len = 1, .key_id = 1, .key_nonce = 5},
    {.kind = SOFTRMA_READ_REQ, .imm = 4, .len = SOFTRMA_BULK_MAX, .key_id = 65535, .off = UINT64_MAX},
    {.kind = SOFTRMA_READ_RESP, .imm = 4, .len = 12345},
    {.kind = SOFTRMA_READ_NACK, .imm = 4, .len = EACCES},
    {.kind = SOFTRMA_REFUSED, .len = ERANGE},
};

static void same_frame(const struct softrma_frame *a, const struct softrma_frame *b)
{
        assert_int_equal(a->kind, b->kind);
        assert_int_equal(a->imm, b->imm);
        assert_int_equal(a->len, b->len);
        assert_int_equal(a->key_id, b->key_id);
        assert_int_equal(a->key_epoch, b->key_epoch);
        assert_int_equal(a->key_nonce, b->key_nonce);
        assert_int_equal(a->off, b->off);
}

static void frames_survive_the_wire(void **state)
{
        for (size_t i = 0; i < ARRAY_LEN(samples); i++) {
                uint8_t wire[SOFTRMA_HEAD_MAX];
                struct softrma_frame back;
                size_t n = softrma_pack(&samples[i], wire);

                assert_int_equal(n, softrma_head_bytes(samples[i].kind));
                assert_int_equal(softrma_unpack(wire, n, MSG_MAX, &back), n);
                same_frame(&samples[i], &back);
                for (size_t have = 0; have < n; have++)
                        assert_int_equal(softrma_unpack(wire, have, MSG_MAX, &back), 0);
        }
}

/* What messages have for themselves says the same as what there is for all kinds. */
static void a_message_is_told_without_a_call(void **state)
{
        static const uint64_t lens[] = {0, 1, 300, MSG_MAX, MSG_MAX + 1, UINT64_MAX};

        for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
                struct softrma_frame f = {.kind = SOFTRMA_MSG, .len = lens[i]};
                uint8_t wire[SOFTRMA_HEAD_MAX], packed[SOFTRMA_HEAD_MIN];
                uint64_t len = 7;

                softrma_pack(&f, wire);
                softrma_pack_msg(lens[i], packed);
                assert_memory_equal(wire, packed, sizeof(packed));
                assert_int_equal(softrma_is_msg(wire, sizeof(wire), MSG_MAX, &len), lens[i] <= MSG_MAX);
                assert_int_equal(len, lens[i]);
                assert_false(softrma_is_msg(wire, SOFTRMA_HEAD_MIN - 1, MSG_MAX, &len));
        }
        for (size_t i = 0; i < ARRAY_LEN(samples); i++) {
                uint8_t wire[SOFTRMA_HEAD_MAX];
                uint64_t len;

                softrma_pack(&samples[i], wire);
                assert_int_equal(softrma_is_msg(wire, sizeof(wire), MSG_MAX, &len), samples[i].kind == SOFTRMA_MSG);
        }
}

/* The layout is a promise to other builds and other processors: spelled out once, byte by byte. */
static void the_layout_is_fixed(void **state)
{
        static const uint8_t expected[] = {0x44, 0x4a, 2, 0, 0, 0, 0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0,
                                           6,    5,    0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2};
        struct softrma_frame f = {.kind = SOFTRMA_WRITE,
                                  .len = 0x0708,
                                  .key_id = 0x0304,
                                  .key_epoch = 0x0506,
                                  .key_nonce = 0x0807060504030201,
                                  .off = 0x0203040506070809};
        uint8_t wire[SOFTRMA_HEAD_MAX];

        assert_int_equal(softrma_pack(&f, wire), sizeof(expected));
        assert_memory_equal(wire, expected, sizeof(expected));
}

static void payload_and_padding(void **state)
{
        struct softrma_frame f = {.kind = SOFTRMA_READ_REQ, .len = 77};

        assert_int_equal(softrma_payload_bytes(&f), 0);
        f.kind = SOFTRMA_READ_RESP;
        assert_int_equal(softrma_payload_bytes(&f), 77);
        assert_int_equal(softrma_pad(77), 3);
        assert_int_equal(softrma_pad(80), 0);
        assert_int_equal(softrma_head_bytes(0), 0);
        assert_int_equal(softrma_head_bytes(SOFTRMA_KINDS), 0);
}

static void expect_refused(const struct softrma_frame *f)
{
        uint8_t wire[SOFTRMA_HEAD_MAX];
        struct softrma_frame back;

        err_clear();
        softrma_pack(f, wire);
        assert_int_equal(softrma_unpack(wire, sizeof(wire), MSG_MAX, &back), -EPROTO);
        assert_true(err_text()[0] != '\0');
}

static void lying_headers_are_refused(void **state)
{
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_MSG, .len = MSG_MAX + 1});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_MSG, .len = UINT64_MAX});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_MSG, .len = 1, .imm = 1});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_WRITE, .len = SOFTRMA_BULK_MAX + 1});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_READ_RESP, .len = UINT64_MAX});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_READ_NACK, .len = 0});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_REFUSED, .len = UINT64_MAX});
        expect_refused(&(struct softrma_frame){.kind = SOFTRMA_REFUSED, .len = EAGAIN});
}

/* Any single bit changed in the fixed part of a header is noticed. */
static void damaged_magic_is_refused(void **state)
{
        uint8_t wire[SOFTRMA_HEAD_MAX];
        struct softrma_frame back;

        for (unsigned bit = 0; bit < 16; bit++) {
                softrma_pack(&samples[0], wire);
                wire[bit / 8] ^= (uint8_t)(1u << bit % 8);
                assert_int_equal(softrma_unpack(wire, sizeof(wire), MSG_MAX, &back), -EPROTO);
        }
        for (unsigned kind = 0; kind < 256; kind++) {
                softrma_pack(&samples[0], wire);
                wire[2] = (uint8_t)kind;
                if (kind == 0 || kind >= SOFTRMA_KINDS)
                        assert_int_equal(softrma_unpack(wire, sizeof(wire), MSG_MAX, &back), -EPROTO);
        }
}

static void random_bytes_never_pass_for_more_than_they_are(void **state)
{
        struct prng p;

        prng_seed(&p, 20);
        for (int i = 0; i < 200000; i++) {
                uint8_t wire[SOFTRMA_HEAD_MAX];
                struct softrma_frame f;
                uint64_t len;
                int rc;

                for (size_t b = 0; b < sizeof(wire); b++)
                        wire[b] = (uint8_t)prng_u64(&p);
                wire[0] = 0x44; /* else hardly one gets past the magic */
                wire[1] = 0x4a;
                wire[2] &= 7;
                wire[3] = 0;
                if (i % 2) { /* nor would a message be among them: immediate and length are right, or nearly */
                        memset(wire + 4, 0, 3 + (size_t)i / 2 % 2);
                        memset(wire + 10, 0, 5 + (size_t)i / 4 % 2);
                }
                rc = softrma_unpack(wire, sizeof(wire), MSG_MAX, &f);
                assert_true(rc == -EPROTO || rc == SOFTRMA_HEAD_MIN || rc == SOFTRMA_HEAD_MAX);
                if (rc > 0)
                        assert_true(f.len <= (f.kind == SOFTRMA_MSG ? MSG_MAX : SOFTRMA_BULK_MAX));
                assert_int_equal(softrma_is_msg(wire, sizeof(wire), MSG_MAX, &len), rc > 0 && f.kind == SOFTRMA_MSG);
        }
}

/* ---- keys ---- */

static uint8_t memory[4096];
static const int owner_a, owner_b;

static struct softrma_frame frame_for(const struct tp_key *key)
{
        struct softrma_key k;

        assert_int_equal(softrma_key_read(key, 99, &k), 0);
        return (struct softrma_frame){
            .kind = SOFTRMA_WRITE, .key_id = k.id, .key_epoch = k.epoch, .key_nonce = k.nonce};
}

static int resolve(const struct softrma_table *t, const struct softrma_frame *f, uint64_t off, uint64_t len)
{
        const void *owner = NULL;
        uint8_t *addr = NULL;
        int rc = softrma_resolve(t, f, off, len, &addr, &owner);

        if (rc == 0)
                assert_ptr_equal(addr, memory + 100 + off);
        else
                assert_null(addr);
        return rc;
}

static void keys_open_their_range_and_no_more(void **state)
{
        struct softrma_table t = {0};
        struct softrma_frame f;
        struct tp_key key;

        assert_int_equal(softrma_export(&t, memory + 100, 1000, &owner_a, 0xabcdef, 99, &key), 0);
        f = frame_for(&key);
        assert_int_equal(resolve(&t, &f, 0, 1000), 0);
        assert_int_equal(resolve(&t, &f, 1000, 0), 0);
        assert_int_equal(resolve(&t, &f, 999, 1), 0);
        assert_int_equal(resolve(&t, &f, 0, 1001), -ERANGE);
        assert_int_equal(resolve(&t, &f, 1001, 0), -ERANGE);
        assert_int_equal(resolve(&t, &f, 999, 2), -ERANGE);
        assert_int_equal(resolve(&t, &f, UINT64_MAX, 2), -ERANGE);
        assert_int_equal(resolve(&t, &f, 2, UINT64_MAX), -ERANGE);
        softrma_table_free(&t);
}

static void guessed_keys_are_refused(void **state)
{
        struct softrma_table t = {0};
        struct softrma_frame f, g;
        struct tp_key key;

        f = (struct softrma_frame){.kind = SOFTRMA_WRITE};
        assert_int_equal(resolve(&t, &f, 0, 1), -EACCES);
        assert_int_equal(softrma_export(&t, memory + 100, 1000, &owner_a, 0xabcdef, 99, &key), 0);
        f = frame_for(&key);
        for (unsigned bit = 0; bit < 64; bit++) {
                g = f;
                g.key_nonce ^= 1ull << bit;
                assert_int_equal(resolve(&t, &g, 0, 1), -EACCES);
        }
        g = f;
        g.key_id++;
        assert_int_equal(resolve(&t, &g, 0, 1), -EACCES); /* a free slot */
        g.key_id = UINT32_MAX;
        assert_int_equal(resolve(&t, &g, 0, 1), -EACCES);
        g = f;
        g.key_epoch++;
        assert_int_equal(resolve(&t, &g, 0, 1), -EACCES);
        softrma_table_free(&t);
}

static void keys_die_with_their_memory(void **state)
{
        struct softrma_table t = {0};
        struct softrma_frame a1, a2, b, again;
        struct tp_key key;

        assert_int_equal(softrma_export(&t, memory + 100, 10, &owner_a, 1, 99, &key), 0);
        a1 = frame_for(&key);
        assert_int_equal(softrma_export(&t, memory + 100, 20, &owner_a, 2, 99, &key), 0);
        a2 = frame_for(&key);
        assert_int_equal(softrma_export(&t, memory + 100, 30, &owner_b, 3, 99, &key), 0);
        b = frame_for(&key);
        softrma_revoke(&t, &owner_a);
        assert_int_equal(resolve(&t, &a1, 0, 1), -ESTALE);
        assert_int_equal(resolve(&t, &a2, 0, 1), -ESTALE);
        assert_int_equal(resolve(&t, &b, 0, 1), 0);
        assert_int_equal(softrma_export(&t, memory + 100, 40, &owner_a, 4, 99, &key), 0);
        again = frame_for(&key);
        assert_int_equal(resolve(&t, &again, 0, 40), 0);
        assert_int_equal(resolve(&t, &a1, 0, 1), -ESTALE);
        assert_int_equal(resolve(&t, &a2, 0, 1), -ESTALE);
        softrma_table_free(&t);
}

static void the_table_is_bounded(void **state)
{
        struct softrma_table t = {0};
        struct tp_key key;

        for (uint32_t i = 0; i < SOFTRMA_KEYS_MAX; i++)
                assert_int_equal(softrma_export(&t, memory, 1, &owner_a, i, 99, &key), 0);
        assert_int_equal(softrma_export(&t, memory, 1, &owner_a, 1, 99, &key), -ENOSPC);
        softrma_revoke(&t, &owner_a);
        assert_int_equal(t.used, 0);
        assert_int_equal(softrma_export(&t, memory, 1, &owner_a, 1, 99, &key), 0);
        softrma_table_free(&t);
}

static void foreign_and_damaged_keys_are_not_imported(void **state)
{
        struct softrma_table t = {0};
        struct softrma_key k;
        struct tp_key key, bad;

        assert_int_equal(softrma_export(&t, memory, 1000, &owner_a, 0xabcdef, 99, &key), 0);
        assert_int_equal(softrma_key_read(&key, 99, &k), 0);
        assert_int_equal(k.len, 1000);
        assert_int_equal(softrma_key_read(&key, 98, &k), -EACCES);
        memset(&bad, 0, sizeof(bad));
        assert_int_equal(softrma_key_read(&bad, 0, &k), -EACCES);
        for (unsigned bit = 0; bit < 8 * TP_KEY_BYTES; bit++) {
                bad = key;
                bad.bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
                assert_int_equal(softrma_key_read(&bad, 99, &k), -EACCES);
        }
        softrma_table_free(&t);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(frames_survive_the_wire),
            cmocka_unit_test(a_message_is_told_without_a_call),
            cmocka_unit_test(the_layout_is_fixed),
            cmocka_unit_test(payload_and_padding),
            cmocka_unit_test(lying_headers_are_refused),
            cmocka_unit_test(damaged_magic_is_refused),
            cmocka_unit_test(random_bytes_never_pass_for_more_than_they_are),
            cmocka_unit_test(keys_open_their_range_and_no_more),
            cmocka_unit_test(guessed_keys_are_refused),
            cmocka_unit_test(keys_die_with_their_memory),
            cmocka_unit_test(the_table_is_bounded),
            cmocka_unit_test(foreign_and_damaged_keys_are_not_imported),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
