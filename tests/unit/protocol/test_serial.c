/* msgpack bodies: what goes in comes out; predicted lengths are exact; lies are refused. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "check.h"
#include "err.h"
#include "proto_fixture.h"

static struct graph g;

static int set_up(void **state)
{
        return fix_graph(&g);
}

static int tear_down(void **state)
{
        graph_free(&g);
        return 0;
}

static void refused(int rc, const char *word)
{
        if (rc != -EPROTO || !strstr(err_text(), word))
                fail_msg("got %d \"%s\", expected \"%s\"", rc, err_text(), word);
        err_clear();
}

struct call {
        struct fix_run f;
        struct run_view v;
        uint8_t input[16], state[112];
        struct serial_blob blobs[2];
};

static void call_init(struct call *c)
{
        c->f = fix_run();
        c->f.inputs[0].flags = c->f.inputs[1].flags = 0;
        c->v = (struct run_view){.run = &c->f.run,
                                 .ranges = c->f.ranges,
                                 .feedback = c->f.feedback,
                                 .inputs = c->f.inputs,
                                 .outputs = c->f.outputs};
        memset(c->input, 0xa5, sizeof(c->input));
        memset(c->state, 0x5a, sizeof(c->state));
        c->blobs[0] = (struct serial_blob){T_IN, 0, c->input, sizeof(c->input)};
        c->blobs[1] = (struct serial_blob){T_STATE, 16, c->state, sizeof(c->state)};
}

static void call_round_trip(void **state)
{
        struct serial_buf b = {0};
        struct serial_call dec = {0};
        struct call c;
        size_t len;
        uint16_t index;

        call_init(&c);
        assert_int_equal(serial_call_bytes(&c.v, &g, c.blobs, 2, &len), 0);
        for (int again = 0; again < 2; again++) {
                struct run_view v;

                assert_int_equal(serial_pack_call(&b, &c.v, &g, c.blobs, 2), 0);
                assert_int_equal(b.len, len);
                assert_int_equal(serial_unpack_call(b.data, b.len, &dec), 0);
                assert_int_equal(dec.run.h.flags, c.f.run.h.flags);
                assert_int_equal(dec.run.run_class, RUN_NORMAL);
                assert_int_equal(dec.run.nranges, 2);
                assert_memory_equal(dec.ranges, c.f.ranges, sizeof(c.f.ranges));
                assert_int_equal(dec.run.nfeedback, 1);
                assert_memory_equal(dec.feedback, c.f.feedback, sizeof(c.f.feedback));
                assert_int_equal(dec.run.ninputs, 2);
                assert_int_equal(dec.blobs[1].tensor, T_STATE);
                assert_int_equal(dec.blobs[1].tensor_off, 16);
                assert_int_equal(dec.blobs[1].len, 112);
                assert_memory_equal(dec.blobs[1].data, c.state, 112);
                assert_memory_equal(dec.blobs[0].data, c.input, 16);
                assert_in_range((uintptr_t)dec.blobs[0].data, (uintptr_t)b.data, (uintptr_t)b.data + b.len);
                assert_int_equal(dec.run.noutputs, 2);
                assert_int_equal(dec.outputs[1].tensor, T_STATE);
                assert_int_equal(dec.outputs[1].len, 128);
                assert_int_equal(dec.outputs[0].flags, OUTPUT_EACH);
                v = (struct run_view){&dec.run, dec.ranges, dec.feedback, dec.inputs, dec.outputs, NULL};
                assert_int_equal(msg_run_check(&v, &g, NULL, 0, 0, &index), 0);
        }
        serial_call_free(&dec);
        serial_free(&b);
}

static void result_round_trip(void **state)
{
        struct serial_buf b = {0};
        struct serial_blob out[3];
        struct call c;
        size_t len;

        call_init(&c);
        for (unsigned n = 0; n <= 2; n++) {
                assert_int_equal(serial_result_bytes(&g, c.blobs, n, &len), 0);
                assert_int_equal(serial_pack_result(&b, &g, c.blobs, n), 0);
                assert_int_equal(b.len, len);
                assert_int_equal(serial_unpack_result(b.data, b.len, out, n), 0);
                for (unsigned i = 0; i < n; i++) {
                        assert_int_equal(out[i].tensor, c.blobs[i].tensor);
                        assert_int_equal(out[i].len, c.blobs[i].len);
                        assert_memory_equal(out[i].data, c.blobs[i].data, out[i].len);
                }
                refused(serial_unpack_result(b.data, b.len, out, n + 1), "array of");
        }
        serial_free(&b);
}

/* Lengths that are no multiple of the tensor's rows or elements still describe themselves. */
static void odd_lengths(void **state)
{
        static uint8_t bytes[70000];
        struct serial_buf b = {0};
        const size_t lens[] = {0, 1, 4, 15, 16, 255, 256, 65535, 65536, 70000};

        for (size_t i = 0; i < ARRAY_LEN(lens); i++) {
                struct serial_blob in = {T_OUT, 3, bytes, lens[i]}, out;

                assert_int_equal(serial_pack_result(&b, &g, &in, 1), 0);
                assert_int_equal(serial_unpack_result(b.data, b.len, &out, 1), 0);
                assert_int_equal(out.len, lens[i]);
                assert_int_equal(out.tensor_off, 3);
        }
        serial_free(&b);
}

/* Every body that is cut short anywhere is refused, and so is one with something behind it. */
static void truncated(void **state)
{
        struct serial_buf b = {0};
        struct serial_call dec = {0};
        struct call c;
        uint8_t *copy;

        call_init(&c);
        assert_int_equal(serial_pack_call(&b, &c.v, &g, c.blobs, 2), 0);
        for (size_t len = 0; len < b.len; len++) {
                copy = malloc(len ? len : 1); /* exact, so that a read beyond it is seen */
                assert_non_null(copy);
                memcpy(copy, b.data, len);
                refused(serial_unpack_call(copy, len, &dec), "in a CALL");
                free(copy);
        }
        copy = malloc(b.len + 1);
        assert_non_null(copy);
        memcpy(copy, b.data, b.len);
        copy[b.len] = 0;
        refused(serial_unpack_call(copy, b.len + 1, &dec), "broken");
        free(copy);
        serial_call_free(&dec);
        serial_free(&b);
}

static void bombs(void **state)
{
        struct serial_call dec = {0};
        static const uint8_t array32[] = {0xdd, 0xff, 0xff, 0xff, 0xff}, map32[] = {0xdf, 0x7f, 0xff, 0xff, 0xff};
        static const uint8_t bin32[] = {0xc6, 0xff, 0xff, 0xff, 0xff, 0}, ext[] = {0xc7, 1, 1, 0};
        static const uint8_t map_half[] = {0xde, 0x00, 0x02, 0xa1, 'a', 1}, nil[] = {0xc0};
        uint8_t deep[64];

        refused(serial_unpack_call(array32, sizeof(array32), &dec), "broken");
        refused(serial_unpack_call(map32, sizeof(map32), &dec), "broken");
        refused(serial_unpack_call(bin32, sizeof(bin32), &dec), "broken");
        refused(serial_unpack_call(ext, sizeof(ext), &dec), "broken");
        refused(serial_unpack_call(map_half, sizeof(map_half), &dec), "broken");
        refused(serial_unpack_call(nil, sizeof(nil), &dec), "not a map");
        memset(deep, 0x91, sizeof(deep));
        deep[63] = 1;
        refused(serial_unpack_call(deep, sizeof(deep), &dec), "broken");
        serial_call_free(&dec);
}

static uint8_t *find(struct serial_buf *b, const char *text)
{
        uint8_t *at = memmem(b->data, b->len, text, strlen(text));

        assert_non_null(at);
        return at;
}

static void field_lies(void **state)
{
        static const struct {
                const char *find;
                int off;
                uint8_t byte;
                const char *word;
        } lies[] = {
            {"model", 0, 'M', "unknown or repeated key"},
            {"class", 5, 0xa0, "class is not an integer"},
            {"outputs", 7, 0xc0, "broken"},
            {"feedback", 9, 0x96, "broken"},
            {"float32", 0, 'g', "dtype"},
            {"shape", 6, 0x7f, "shape means"},
            {"shape", 5, 0x90, "broken"},
            {"tensor", 6, 0xe0, "tensor is not an integer"},
        };
        struct serial_buf b = {0};
        struct serial_call dec = {0};
        struct call c;

        call_init(&c);
        for (size_t i = 0; i < ARRAY_LEN(lies); i++) {
                assert_int_equal(serial_pack_call(&b, &c.v, &g, c.blobs, 2), 0);
                find(&b, lies[i].find)[lies[i].off] = lies[i].byte;
                if (serial_unpack_call(b.data, b.len, &dec) == 0 || !strstr(err_text(), lies[i].word))
                        fail_msg("lie %zu: \"%s\", expected \"%s\"", i, err_text(), lies[i].word);
        }
        serial_call_free(&dec);
        serial_free(&b);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(call_round_trip), cmocka_unit_test(result_round_trip),
            cmocka_unit_test(odd_lengths),     cmocka_unit_test(truncated),
            cmocka_unit_test(bombs),           cmocka_unit_test(field_lies),
        };

        return cmocka_run_group_tests(tests, set_up, tear_down);
}
