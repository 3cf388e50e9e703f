/* A small graph with a tensor of every residency, and a RUN over it that is right in every field. */
#ifndef DJINN_TESTS_PROTO_FIXTURE_H
#define DJINN_TESTS_PROTO_FIXTURE_H

#include <string.h>

#include "protocol.h"

enum { T_IN, T_W, T_ACT, T_OUT, T_STATE, T_COUNT };
enum { FIX_ROWS_MAX = 6, FIX_WIDTH = 4 };

static inline int fix_graph(struct graph *out)
{
        struct graph_builder *b = gb_new("fixture", 1, FIX_ROWS_MAX, 0, DT_F32);
        const int64_t rows[] = {GRAPH_ROWS, FIX_WIDTH}, square[] = {FIX_WIDTH, FIX_WIDTH}, state[] = {8, FIX_WIDTH};
        struct graph_recipe piece = {.source = "w", .next = GRAPH_NONE, .synth_scale = 1.0f};
        const struct op_attr relu = {.act = ACT_RELU};

        gb_tensor(b, "in", DT_F32, RES_INPUT, 2, rows);
        gb_tensor(b, "w", DT_F32, RES_WEIGHT, 2, square);
        gb_recipe(b, T_W, &piece);
        gb_tensor(b, "act", DT_F32, RES_ACTIVATION, 2, rows);
        gb_tensor(b, "out", DT_F32, RES_OUTPUT, 2, rows);
        gb_tensor(b, "state", DT_F32, RES_STATE, 2, state);
        gb_role(b, ROLE_INPUT, T_IN);
        gb_role(b, ROLE_OUTPUT, T_OUT);
        gb_segment(b, SEG_BODY, PHASE_FORWARD);
        gb_node(b, OP_LINEAR, NULL, 5, (unsigned[]){T_ACT, T_IN, T_W, GRAPH_NONE, GRAPH_NONE});
        gb_node(b, OP_ACT, &relu, 2, (unsigned[]){T_OUT, T_ACT});
        return gb_finish(b, out);
}

struct fix_run {
        struct msg_run run;
        struct run_range ranges[2];
        struct run_feedback feedback[1];
        struct run_input inputs[2];
        struct run_output outputs[2];
        uint8_t bytes[16];
};

static inline struct fix_run fix_run(void)
{
        struct fix_run f = {
            .run =
                {.run_class = RUN_NORMAL, .nranges = 2, .nfeedback = 1, .ninputs = 2, .noutputs = 2, .inline_len = 16},
            .ranges = {{.count = 2, .rows = 2, .repeat = 1}, {.count = 2, .rows = 1, .repeat = 3, .feedback = 1}},
            .feedback = {{.src = T_OUT, .dst = T_IN, .src_off = 16, .src_step = 16, .len = 16}},
            .inputs = {{.tensor = T_IN, .flags = INPUT_INLINE, .len = 16},
                       {.tensor = T_STATE, .flags = INPUT_WRITTEN, .tensor_off = 16, .len = 112}},
            .outputs = {{.tensor = T_OUT, .flags = OUTPUT_EACH, .region = 0, .step = 16, .len = 16},
                        {.tensor = T_STATE, .region = 1, .len = 128, .region_off = 8}},
        };

        f.run.h.flags = RUN_PLAN_CACHE | RUN_PROFILE;
        for (size_t i = 0; i < sizeof(f.bytes); i++)
                f.bytes[i] = (uint8_t)(i * 17);
        return f;
}

static const uint64_t fix_regions[2] = {64, 136};

static inline size_t fix_pack(const struct fix_run *f, void *frame)
{
        return msg_run_pack(frame, &f->run, f->ranges, f->feedback, f->inputs, f->outputs, f->bytes);
}

#endif
