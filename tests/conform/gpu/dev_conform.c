/*
 * dev_conform DEVICE OP [THREADS]: every case of one op on one device against the reference. Exit 0, 1, or 77 with the
 * reason.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "harness.h"

static void (*const cases[OP_COUNT])(struct harness *) = {
    [OP_COPY] = cases_copy,
    [OP_EMBED] = cases_embed,
    [OP_LAYERNORM] = cases_layernorm,
    [OP_LINEAR] = cases_linear,
    [OP_ACT] = cases_act,
    [OP_ADD] = cases_add,
    [OP_KV_APPEND] = cases_kv_append,
    [OP_ATTENTION] = cases_attention,
    [OP_LAST_ROW] = cases_last_row,
    [OP_ARGMAX] = cases_argmax,
    [OP_EMIT] = cases_emit,
};

static int op_find(const char *name)
{
        for (int i = 0; i < OP_COUNT; i++)
                if (strcmp(op_infos[i].name, name) == 0)
                        return i;
        return -1;
}

int main(int argc, char **argv)
{
        struct harness h = {0};
        int op = argc == 3 || argc == 4 ? op_find(argv[2]) : -1, threads = argc == 4 ? atoi(argv[3]) : 1;

        if (op < 0) {
                fprintf(stderr, "usage: dev_conform DEVICE OP [THREADS]\n");
                return 2;
        }
        if (dev_open(argv[1], threads, &h.device) < 0) {
                printf("skipped: %s\n", err_text());
                return 77;
        }
        BUG_ON(dev_open("reference", 1, &h.reference) < 0);
        prng_seed(&h.prng, 2026 + (uint64_t)op);
        cases[op](&h);
        printf("%s on %s: %u cases, %u failures\n", argv[2], argv[1], h.cases, h.failures);
        dev_close(h.device);
        dev_close(h.reference);
        return h.failures || !h.cases;
}
