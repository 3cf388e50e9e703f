/*
 * Bytes that mean harm to the functions that look at them first: frames, RUNs, msgpack bodies. A seeded mutation of
 * valid ones, run as an ordinary test: nothing may be read or written out of place (the sanitized build sees to that),
 * and what is accepted must obey its own bounds. With an argument, the file's bytes are the input (for a fuzzer or a
 * regression).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../unit/protocol/proto_fixture.h"
#include "check.h"
#include "err.h"
#include "prng.h"

#define ROUNDS    60000u
#define INPUT_MAX 2048u

static struct graph g;

/* ---- properties of what was accepted ---- */

static void accepted_run(const struct run_view *v)
{
        uint64_t iterations = 0;

        for (unsigned i = 0; i < v->run->nranges; i++) {
                BUG_ON(v->ranges[i].first + v->ranges[i].count > g.h->nnodes);
                BUG_ON(v->ranges[i].rows > g.h->rows_max);
                iterations += v->ranges[i].repeat;
        }
        for (unsigned i = 0; i < v->run->ninputs; i++) {
                const struct run_input *in = &v->inputs[i];

                BUG_ON(g.tensors[in->tensor].residency != RES_INPUT && g.tensors[in->tensor].residency != RES_STATE);
                BUG_ON(in->tensor_off + in->len > graph_tensor_bytes(&g, in->tensor, g.h->rows_max, NULL));
                BUG_ON(in->flags == INPUT_INLINE && in->offset + in->len > v->run->inline_len);
        }
        for (unsigned i = 0; i < v->run->noutputs; i++) {
                const struct run_output *o = &v->outputs[i];

                BUG_ON(g.tensors[o->tensor].residency == RES_WEIGHT);
                BUG_ON(o->tensor_off + o->len > graph_tensor_bytes(&g, o->tensor, g.h->rows_max, NULL));
                BUG_ON(o->region_off + (iterations - 1) * o->step + o->len > fix_regions[o->region]);
        }
}

static void accepted_blob(const struct serial_blob *b, const void *body, size_t len)
{
        const uint8_t *from = b->data, *start = body;

        BUG_ON(b->len > 0 && (from < start || from > start + len || b->len > (size_t)(start + len - from)));
}

/* ---- one input ---- */

static unsigned try_frame(const void *frame, size_t len)
{
        const uint32_t *lengths;
        struct run_view v;
        uint16_t index;

        if (msg_check(frame, len) < 0)
                return 0;
        switch (((const struct msg_header *)frame)->opcode) {
        case MSG_RUN:
                if (msg_run_view(frame, len, &v) < 0 || msg_run_check(&v, &g, fix_regions, 2, 1e9, &index) < 0)
                        return 0;
                accepted_run(&v);
                return 1;
        case MSG_PATTERN:
                if (msg_pattern_view(frame, len, &lengths) < 0)
                        return 0;
                for (unsigned i = 0; i < ((const struct msg_pattern *)frame)->nwrites; i++)
                        BUG_ON((const uint8_t *)&lengths[i + 1] > (const uint8_t *)frame + len);
                return 1;
        }
        return 1;
}

static unsigned try_body(const void *body, size_t len)
{
        static struct serial_call dec;
        struct serial_blob out[2];
        unsigned ok = 0;

        if (serial_unpack_call(body, len, &dec) == 0) {
                for (unsigned i = 0; i < dec.run.ninputs; i++)
                        accepted_blob(&dec.blobs[i], body, len);
                ok++;
        }
        if (serial_unpack_result(body, len, out, 2) == 0) {
                accepted_blob(&out[0], body, len);
                accepted_blob(&out[1], body, len);
                ok++;
        }
        serial_call_free(&dec);
        return ok;
}

/* On the heap and of exactly its length, so that a step too far is seen. */
static unsigned try_input(const uint8_t *data, size_t len)
{
        uint8_t *copy = malloc(len ? len : 1);
        unsigned ok;

        BUG_ON(!copy);
        memcpy(copy, data, len);
        ok = try_frame(copy, len) + try_body(copy, len);
        free(copy);
        return ok;
}

/* ---- seeds ---- */

struct seed {
        uint8_t data[INPUT_MAX];
        size_t len;
};

/* The shortest frame of each opcode; where zeros are no answer, with what makes it one. */
static unsigned frame_seeds(struct seed *out)
{
        unsigned n = 0;

        for (unsigned op = 1; op < MSG_OPCODES; op++, n++) {
                struct seed *s = &out[n];

                ((struct msg_keys *)s->data)->kind = op == MSG_KEYS ? KEYS_GIVE : 0;
                if (op == MSG_LOAD)
                        ((struct msg_load *)s->data)->weights = MSG_WEIGHTS_SEED;
                if (op == MSG_PATTERN)
                        ((struct msg_pattern *)s->data)->reply_len = 64;
                for (s->len = op == MSG_PATTERN ? sizeof(struct msg_pattern) : 24; s->len < 400; s->len += 8) {
                        msg_header_init((struct msg_header *)s->data, op, s->len, 0, 1);
                        if (msg_check(s->data, s->len) == 0)
                                break;
                }
        }
        return n;
}

static unsigned run_seeds(struct seed *out)
{
        struct fix_run f = fix_run();
        struct run_view v = {&f.run, f.ranges, f.feedback, f.inputs, f.outputs, f.bytes};
        struct serial_blob blobs[2] = {{T_IN, 0, f.bytes, 16}, {T_STATE, 16, f.bytes, 16}};
        struct serial_buf b = {0};

        out[0].len = fix_pack(&f, out[0].data);
        BUG_ON(serial_pack_call(&b, &v, &g, blobs, 2) < 0 || b.len > INPUT_MAX);
        memcpy(out[1].data, b.data, out[1].len = b.len);
        BUG_ON(serial_pack_result(&b, &g, blobs, 2) < 0 || b.len > INPUT_MAX);
        memcpy(out[2].data, b.data, out[2].len = b.len);
        serial_free(&b);
        return 3;
}

static size_t mutate(struct prng *p, uint8_t *data, size_t len)
{
        static const uint8_t evil[] = {0x00, 0x01, 0x7f, 0x80, 0xff, 0xdd, 0xdf, 0xc6, 0x9f, 0x8f};

        for (uint64_t n = 1 + prng_below(p, 4); n > 0 && len > 0; n--) {
                size_t at = prng_below(p, len);

                switch (prng_below(p, 5)) {
                case 0:
                        data[at] ^= (uint8_t)(1u << prng_below(p, 8));
                        break;
                case 1:
                        data[at] = evil[prng_below(p, ARRAY_LEN(evil))];
                        break;
                case 2:
                        memset(data + at, 0xff, len - at < 8 ? len - at : 8);
                        break;
                case 3:
                        len = at;
                        break;
                default:
                        memmove(data + at, data + prng_below(p, len), len - at < 16 ? 0 : 8);
                        break;
                }
        }
        return len;
}

static int run_file(const char *path)
{
        static uint8_t data[1 << 20];
        FILE *f = fopen(path, "rb");

        if (!f)
                return 2;
        printf("%s: accepted as %u things\n", path, try_input(data, fread(data, 1, sizeof(data), f)));
        fclose(f);
        return 0;
}

int main(int argc, char **argv)
{
        static struct seed seeds[MSG_OPCODES + 3];
        unsigned n, accepted = 0, valid = 0;
        struct prng p;

        if (fix_graph(&g) < 0)
                return 2;
        if (argc > 1)
                return run_file(argv[1]);
        n = frame_seeds(seeds);
        n += run_seeds(seeds + n);
        for (unsigned i = 0; i < n; i++)
                valid += try_input(seeds[i].data, seeds[i].len) > 0;
        prng_seed(&p, 20);
        for (unsigned k = 0; k < ROUNDS; k++) {
                struct seed s = seeds[prng_below(&p, n)];

                s.len = mutate(&p, s.data, s.len);
                /* A length that lies ends most frames at once; every other one tells the truth. */
                if (k % 2 && s.len >= sizeof(struct msg_header))
                        ((struct msg_header *)s.data)->length = (uint32_t)s.len;
                accepted += try_input(s.data, s.len) > 0;
        }
        printf("%u of %u seeds valid, %u of %u mutations accepted\n", valid, n, accepted, ROUNDS);
        graph_free(&g);
        /* A RUN of zeros has no ranges; everything else is valid. */
        return valid != n - 1 || accepted == 0 || accepted > ROUNDS / 2;
}
