/*
 * perf: sizes, slots and the words that messages are made of.
 *
 * A message's words are an arithmetic progression whose first term is a hash of run, connection, direction and number:
 * every word depends on where it stands and on which message it belongs to, and making or checking one costs an
 * addition, so that a check keeps up with memory.
 */
#include <math.h>
#include <string.h>

#include "check.h"
#include "perf_inside.h"
#include "prng.h"

#define STEP        0x9e3779b97f4a7c15ull
#define PEER_STREAM 0x5bd1e995u
#define SIZE_STREAM 0x7f4a7c15u

uint64_t perf_stride(uint64_t size)
{
        return ALIGN_UP(size ? size : 1, (uint64_t)CACHE_LINE);
}

/* A window of transfers in slots of its own, as far as they fit into what a launch may take. */
unsigned perf_slots(const struct perf_opts *o, uint64_t size)
{
        uint64_t room = PERF_REGION_MAX / (uint64_t)o->connections, fit;

        if (o->test == PERF_LAT && o->rate == 0)
                return 1;
        room = room < PERF_SLOTS_BYTES ? room : PERF_SLOTS_BYTES;
        fit = room / perf_stride(size);
        fit = fit ? fit : 1;
        return (unsigned)(fit < (uint64_t)o->depth ? fit : (uint64_t)o->depth);
}

uint64_t perf_slots_bytes(const struct perf_opts *o, const struct perf_size *size)
{
        uint64_t bytes = perf_stride(size->hi) * perf_slots(o, size->hi);

        return bytes < 4096 ? 4096 : bytes;
}

/* ---- sizes ---- */

uint64_t perf_octaves(const struct perf_size *size)
{
        return size->mixed ? (uint64_t)(log2((double)size->hi / (double)size->lo) * 4294967296.0) : 0;
}

/* Integers only, so that both ends draw the same whatever their compilers: 2^f is 1 + f (0.6565 + 0.3435 f) within
 * 0.3 %. */
uint64_t perf_size_at(const struct perf_case *k, unsigned conn, uint64_t seq)
{
        uint64_t at, f, base, size;

        if (!k->octaves)
                return k->lo;
        at = (uint64_t)(((unsigned __int128)prng_at(k->seed ^ SIZE_STREAM, conn, seq) * (k->octaves + 1)) >> 64);
        f = at & 0xffffffffu;
        base = k->lo << (at >> 32);
        f = (f * (2819638928u + ((1475328368u * f) >> 32))) >> 32;
        size = base + (uint64_t)(((unsigned __int128)base * f) >> 32);
        return size < k->hi ? size : k->hi;
}

void perf_slot_order(const struct perf_case *k, uint16_t *order)
{
        struct prng p;

        prng_seed(&p, k->seed);
        for (unsigned i = 0; i < k->slots; i++) {
                unsigned j = (unsigned)prng_below(&p, i + 1);

                order[i] = order[j];
                order[j] = (uint16_t)i;
        }
}

/* ---- words ---- */

uint64_t perf_stream(const struct perf_case *k, unsigned conn, bool from_driver, uint64_t seq)
{
        return prng_at(k->seed ^ (from_driver ? 0 : PEER_STREAM), conn, seq);
}

void perf_fill(void *p, uint64_t len, uint64_t stream)
{
        uint8_t *at = p;
        uint64_t v = stream, i = 0;

        for (; i + 32 <= len; i += 32, v += 4 * STEP) {
                uint64_t four[4] = {v, v + STEP, v + 2 * STEP, v + 3 * STEP};

                memcpy(at + i, four, sizeof(four));
        }
        for (; i < len; i += 8, v += STEP)
                memcpy(at + i, &v, len - i < 8 ? len - i : 8);
}

bool perf_holds(const void *p, uint64_t len, uint64_t stream)
{
        const uint8_t *at = p;
        uint64_t v = stream, i = 0, differ = 0;

        for (; i + 32 <= len; i += 32, v += 4 * STEP) {
                uint64_t four[4];

                memcpy(four, at + i, sizeof(four));
                differ |=
                    (four[0] ^ v) | (four[1] ^ (v + STEP)) | (four[2] ^ (v + 2 * STEP)) | (four[3] ^ (v + 3 * STEP));
        }
        for (; i < len && !differ; i += 8, v += STEP)
                differ |= memcmp(at + i, &v, len - i < 8 ? len - i : 8) != 0;
        return !differ;
}
