/* Each check of protocol.c accepts what is right and refuses each lie, one at a time. */
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

static void refused(int rc, int want, const char *word)
{
        if (rc != want || !strstr(err_text(), word))
                fail_msg("got %d \"%s\", expected %d and \"%s\"", rc, err_text(), want, word);
        err_clear();
}

/* ---- frames ---- */

static void headers(void **state)
{
        struct msg_time t = {0};
        struct lie {
                const char *word;
                size_t off;
                uint8_t byte;
        } lies[] = {
            {"magic", offsetof(struct msg_header, magic), 0},
            {"version", offsetof(struct msg_header, version), 9},
            {"unknown", offsetof(struct msg_header, opcode), 0},
            {"unknown", offsetof(struct msg_header, opcode), MSG_OPCODES},
            {"says", offsetof(struct msg_header, length), 47},
            {"no frame of this kind", offsetof(struct msg_header, opcode), MSG_CREDIT},
        };

        msg_header_init(&t.h, MSG_TIME, sizeof(t), 5, 77);
        assert_int_equal(t.h.flags, 5);
        assert_int_equal(t.h.request_id, 77);
        assert_int_equal(msg_check(&t, sizeof(t)), 0);
        refused(msg_check(&t, 23), -EPROTO, "shorter");
        refused(msg_check(&t, sizeof(t) - 1), -EPROTO, "says");
        for (size_t i = 0; i < ARRAY_LEN(lies); i++) {
                struct msg_time bad = t;

                ((uint8_t *)&bad)[lies[i].off] = lies[i].byte;
                refused(msg_check(&bad, sizeof(bad)), -EPROTO, lies[i].word);
        }
}

static void lengths_of_every_opcode(void **state)
{
        static uint8_t frame[1024];
        unsigned known = 0;

        for (unsigned op = 1; op < MSG_OPCODES; op++) {
                unsigned lengths = 0;

                memset(frame, 0, sizeof(frame));
                for (size_t len = sizeof(struct msg_header); len <= sizeof(frame); len++) {
                        msg_header_init((struct msg_header *)frame, op, len, 0, 0);
                        lengths += msg_check(frame, len) == 0;
                        err_clear();
                }
                assert_string_not_equal(msg_opcode_name(op), "unknown");
                known++;
                /* Zeros behind the header are no LOAD (weights 0) and no KEYS (kind 0). */
                if (op == MSG_LOAD || op == MSG_KEYS)
                        assert_int_equal(lengths, 0);
                else
                        assert_in_range(lengths, 1, sizeof(frame));
        }
        assert_int_equal(known, 23);
        assert_string_equal(msg_opcode_name(0), "unknown");
        assert_string_equal(msg_opcode_name(4711), "unknown");
}

static void load_frames(void **state)
{
        struct {
                struct msg_load m;
                uint8_t part[8];
        } f = {.m = {.total_len = 100, .offset = 92, .part_len = 8, .weights = MSG_WEIGHTS_SEED}};

#define LIE(field, value, word)                                       \
        do {                                                          \
                __typeof__(f) bad = f;                                \
                bad.field = (value);                                  \
                refused(msg_check(&bad, sizeof(bad)), -EPROTO, word); \
        } while (0)
        msg_header_init(&f.m.h, MSG_LOAD, sizeof(f), 0, 0);
        assert_int_equal(msg_check(&f, sizeof(f)), 0);
        LIE(m.part_len, 7, "part_len");
        LIE(m.part_len, 9, "part_len");
        LIE(m.total_len, GRAPH_BYTES_MAX + 1, "at most");
        LIE(m.offset, 93, "outside");
        LIE(m.offset, UINT32_MAX, "outside");
        LIE(m.weights, 0, "weights");
        LIE(m.weights, 5, "weights");
        memset(f.m.model_id, 'x', sizeof(f.m.model_id));
        refused(msg_check(&f, sizeof(f)), -EPROTO, "terminated");
#undef LIE
}

static void strings_are_terminated(void **state)
{
        struct msg_auth_reply a = {0};
        struct msg_error e = {0};

        msg_header_init(&a.h, MSG_AUTH, sizeof(a), 0, 0);
        assert_int_equal(msg_check(&a, sizeof(a)), 0);
        memset(a.library, 'x', sizeof(a.library));
        refused(msg_check(&a, sizeof(a)), -EPROTO, "terminated");

        msg_header_init(&e.h, MSG_ERROR, sizeof(e), 0, 0);
        assert_int_equal(msg_check(&e, sizeof(e)), 0);
        e.phase = PH_COUNT;
        refused(msg_check(&e, sizeof(e)), -EPROTO, "phase");
        e.phase = 0;
        memset(e.text, 'x', sizeof(e.text));
        refused(msg_check(&e, sizeof(e)), -EPROTO, "terminated");
}

static void calls_and_results(void **state)
{
        struct {
                struct msg_call m;
                uint8_t body[8];
        } c = {.m = {.body_len = 8}};
        struct {
                struct msg_result m;
                uint8_t body[8];
        } r = {.m = {.body_len = 8}};

        msg_header_init(&c.m.h, MSG_CALL, sizeof(c), 0, 0);
        assert_int_equal(msg_check(&c, sizeof(c)), 0);
        c.m.body_len = UINT64_MAX;
        refused(msg_check(&c, sizeof(c)), -EPROTO, "body_len");
        c.m.in_staging = 1;
        refused(msg_check(&c, sizeof(c)), -EPROTO, "body_len");
        c.m.in_staging = 2;
        refused(msg_check(&c, sizeof(c)), -EPROTO, "in_staging");
        msg_header_init(&c.m.h, MSG_CALL, sizeof(c.m), 0, 0);
        c.m.in_staging = 1;
        assert_int_equal(msg_check(&c, sizeof(c.m)), 0);

        msg_header_init(&r.m.done.h, MSG_RESULT, sizeof(r), 0, 0);
        assert_int_equal(msg_check(&r, sizeof(r)), 0);
        r.m.body_len = 9;
        refused(msg_check(&r, sizeof(r)), -EPROTO, "body_len");
        r.m.in_region = 7;
        refused(msg_check(&r, sizeof(r)), -EPROTO, "in_region");
}

static void patterns(void **state)
{
        struct {
                struct msg_pattern m;
                uint32_t lengths[2];
        } p = {.m = {.reply_len = sizeof(struct msg_pattern_reply), .nwrites = 2}, .lengths = {5, 6}};
        const uint32_t *lengths;

        assert_int_equal(msg_pattern_view(&p, sizeof(p), &lengths), 0);
        assert_int_equal(lengths[1], 6);
        p.m.nwrites = 3;
        refused(msg_pattern_view(&p, sizeof(p), &lengths), -EPROTO, "do not fit");
        p.m.nwrites = UINT32_MAX;
        refused(msg_pattern_view(&p, sizeof(p), &lengths), -EPROTO, "do not fit");
        p.m.nwrites = 0;
        refused(msg_pattern_view(&p, sizeof(p.m) - 1, &lengths), -EPROTO, "at least");
        p.m.reply_len--;
        refused(msg_pattern_view(&p, sizeof(p), &lengths), -EPROTO, "reply_len");
}

/* ---- RUN ---- */

static int run_check(const struct fix_run *f, double flop, uint16_t *index)
{
        _Alignas(8) uint8_t frame[1024];
        struct run_view v;
        size_t len = fix_pack(f, frame);
        int rc = msg_run_view(frame, len, &v);

        return rc < 0 ? rc : msg_run_check(&v, &g, fix_regions, 2, flop, index);
}

static void run_round_trip(void **state)
{
        _Alignas(8) uint8_t frame[1024];
        struct fix_run f = fix_run();
        size_t len = fix_pack(&f, frame);
        struct run_view v;
        uint16_t index;

        assert_int_equal(len, msg_run_bytes(2, 1, 2, 2, 16));
        assert_int_equal(msg_check(frame, len), 0);
        assert_int_equal(msg_run_view(frame, len, &v), 0);
        assert_memory_equal(v.ranges, f.ranges, sizeof(f.ranges));
        assert_memory_equal(v.feedback, f.feedback, sizeof(f.feedback));
        assert_memory_equal(v.inputs, f.inputs, sizeof(f.inputs));
        assert_memory_equal(v.outputs, f.outputs, sizeof(f.outputs));
        assert_memory_equal(v.inline_bytes, f.bytes, sizeof(f.bytes));
        assert_int_equal(v.run->h.flags, f.run.h.flags);
        assert_int_equal(msg_run_check(&v, &g, fix_regions, 2, 1e9, &index), 0);
        assert_int_equal(index, 0xffff);
        assert_int_equal(msg_run_check(&v, &g, fix_regions, 2, 0, &index), 0);
        assert_int_equal(index, 0xffff);
}

static void run_structure(void **state)
{
        _Alignas(8) uint8_t frame[1024] = {0};
        struct fix_run f = fix_run();
        struct msg_run *r = (struct msg_run *)frame;
        size_t len = fix_pack(&f, frame);
        struct run_view v;

        refused(msg_run_view(frame, sizeof(*r) - 1, &v), -EPROTO, "at least");
        refused(msg_run_view(frame, len - 1, &v), -EPROTO, "add up");
        refused(msg_run_view(frame, len + 1, &v), -EPROTO, "add up");
        r->inline_len = UINT32_MAX;
        refused(msg_run_view(frame, len, &v), -EPROTO, "add up");
        fix_pack(&f, frame);
        r->nranges = 0;
        refused(msg_run_view(frame, len, &v), -EPROTO, "ranges");
        r->nranges = RUN_RANGES_MAX + 1;
        refused(msg_run_view(frame, len, &v), -EPROTO, "ranges");
        fix_pack(&f, frame);
        r->nfeedback = RUN_FEEDBACK_MAX + 1;
        refused(msg_run_view(frame, len, &v), -EPROTO, "feedback");
        fix_pack(&f, frame);
        r->ninputs = RUN_INPUTS_MAX + 1;
        refused(msg_run_view(frame, len, &v), -EPROTO, "inputs");
        fix_pack(&f, frame);
        r->noutputs = RUN_OUTPUTS_MAX + 1;
        refused(msg_run_view(frame, len, &v), -EPROTO, "outputs");
}

/* One field of a right RUN, made wrong. */
#define LIE(field, value, element, word)                            \
        do {                                                        \
                struct fix_run bad = fix_run();                     \
                uint16_t index = 0;                                 \
                                                                    \
                bad.field = (value);                                \
                refused(run_check(&bad, 0, &index), -EINVAL, word); \
                assert_int_equal(index, element);                   \
        } while (0)

static void run_lies_in_head_and_ranges(void **state)
{
        LIE(run.h.flags, 0x20, 0xffff, "unknown flags");
        LIE(run.h.flags, DONE_PLAN_HIT, 0xffff, "unknown flags");
        LIE(run.run_class, RUN_CLASSES, 0xffff, "class");
        LIE(run.reserved, 1, 0xffff, "reserved");
        LIE(ranges[1].count, 0, 1, "nodes");
        LIE(ranges[1].count, 3, 1, "nodes");
        LIE(ranges[0].first, 1, 0, "nodes");
        LIE(ranges[0].first, UINT32_MAX, 0, "nodes");
        LIE(ranges[0].rows, 0, 0, "rows");
        LIE(ranges[0].rows, FIX_ROWS_MAX + 1, 0, "rows");
        LIE(ranges[1].repeat, 0, 1, "repeat");
        LIE(ranges[1].repeat, RUN_REPEAT_MAX + 1, 1, "repeat");
        LIE(ranges[1].repeat, RUN_REPEAT_MAX, 0xffff, "iterations in all");
        LIE(ranges[1].feedback, 2, 1, "feedback");
        LIE(ranges[0].feedback, 1, 0, "no iteration before");
        LIE(ranges[0].reserved, 1, 0, "reserved");
}

static void run_lies_in_operands(void **state)
{
        LIE(feedback[0].src, T_COUNT, 0, "names tensor");
        LIE(feedback[0].src, T_W, 0, "may use");
        LIE(feedback[0].src, T_ACT, 0, "may use");
        LIE(feedback[0].dst, T_OUT, 0, "may use");
        LIE(feedback[0].src, T_IN, 0, "to itself");
        LIE(feedback[0].src_off, 64, 0, "outside");
        LIE(feedback[0].src_step, UINT32_MAX, 0, "outside");
        LIE(feedback[0].len, UINT64_MAX, 0, "outside");
        LIE(inputs[0].tensor, T_COUNT, 0, "names tensor");
        LIE(inputs[1].tensor, T_W, 1, "may use");
        LIE(inputs[1].tensor, T_OUT, 1, "may use");
        LIE(inputs[0].flags, 0, 0, "inline or written");
        LIE(inputs[0].flags, INPUT_INLINE | INPUT_WRITTEN, 0, "inline or written");
        LIE(inputs[0].offset, 1, 0, "inline bytes");
        LIE(inputs[0].offset, UINT64_MAX, 0, "inline bytes");
        LIE(inputs[0].len, 17, 0, "inline bytes");
        LIE(inputs[0].tensor_off, FIX_ROWS_MAX * 16 - 15, 0, "outside");
        LIE(inputs[1].len, 113, 1, "outside");
        LIE(inputs[1].tensor_off, UINT64_MAX, 1, "outside");
}

static void run_lies_in_outputs(void **state)
{
        LIE(outputs[1].tensor, T_W, 1, "may use");
        LIE(outputs[1].tensor, T_ACT, 1, "may use");
        LIE(outputs[0].flags, 2, 0, "flags");
        LIE(outputs[1].step, 1, 1, "without OUTPUT_EACH");
        LIE(outputs[1].tensor_off, 1, 1, "outside tensor");
        LIE(outputs[0].len, UINT64_MAX, 0, "outside tensor");
        LIE(outputs[1].region, 2, 1, "was not given");
        LIE(outputs[0].step, 17, 0, "outside region");
        LIE(outputs[0].region_off, 1, 0, "outside region");
        LIE(outputs[1].region_off, 9, 1, "outside region");
        LIE(outputs[1].region_off, UINT64_MAX, 1, "outside region");
}

static void run_flop(void **state)
{
        struct fix_run f = fix_run();
        struct graph_cost two, one;
        uint16_t index;
        double flop;

        assert_int_equal(graph_cost(&g, 2, 0, 2, 0, &two), 0);
        assert_int_equal(graph_cost(&g, 1, 0, 2, 0, &one), 0);
        flop = two.flop + 3 * one.flop;
        assert_int_equal(run_check(&f, flop, &index), 0);
        refused(run_check(&f, flop * 0.99, &index), -EINVAL, "FLOP");
        assert_int_equal(index, 1);
        refused(run_check(&f, two.flop * 0.99, &index), -EINVAL, "FLOP");
        assert_int_equal(index, 0);
}

static void call_inputs_are_blobs(void **state)
{
        _Alignas(8) uint8_t frame[1024];
        struct fix_run f = fix_run();
        struct run_view v;
        uint16_t index;

        fix_pack(&f, frame);
        assert_int_equal(msg_run_view(frame, ((struct msg_header *)frame)->length, &v), 0);
        refused(msg_run_check(&v, &g, NULL, 0, 0, &index), -EINVAL, "none");
        f.inputs[0].flags = f.inputs[1].flags = 0;
        f.outputs[0].region = 99;
        fix_pack(&f, frame);
        assert_int_equal(msg_run_check(&v, &g, NULL, 0, 0, &index), 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(headers),
            cmocka_unit_test(lengths_of_every_opcode),
            cmocka_unit_test(load_frames),
            cmocka_unit_test(strings_are_terminated),
            cmocka_unit_test(calls_and_results),
            cmocka_unit_test(patterns),
            cmocka_unit_test(run_round_trip),
            cmocka_unit_test(run_structure),
            cmocka_unit_test(run_lies_in_head_and_ranges),
            cmocka_unit_test(run_lies_in_operands),
            cmocka_unit_test(run_lies_in_outputs),
            cmocka_unit_test(run_flop),
            cmocka_unit_test(call_inputs_are_blobs),
        };

        return cmocka_run_group_tests(tests, set_up, tear_down);
}
