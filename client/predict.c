/* `sweep --check` and `plan`: what would happen, from the plans alone. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "sweep.h"
#include "same_job.h"

/* What a connection will allow is known only when it stands; these are what every backend and the server here give.
 * Payload bytes and round trips do not depend on them. */
#define ASSUMED_MSG_MAX      65536u
#define ASSUMED_INLINE_BYTES 16384u
/* For a rough duration: what one core of a common host computes and moves. */
#define ROUGH_FLOP_PER_S   4e10
#define ROUGH_BYTES_PER_S  5e9
#define ROUGH_ROUND_TRIP_S 3e-5

struct prediction {
        struct plan_bytes up, down;
        uint64_t round_trips;
        double flop, bytes, tokens;
};

static int predict(const struct workload *w, const struct graph *g, const struct switches *sw, struct prediction *out,
                   FILE *details)
{
        struct plan_limits limits = {ASSUMED_MSG_MAX, ASSUMED_INLINE_BYTES};

        *out = (struct prediction){0};
        for (uint32_t t = 0; t < workload_turns(w); t++) {
                struct plan_shape s = workload_shape(w, t, sw->state != SW_STATE_RECOMPUTE, false);
                struct plan p;
                int rc = plan_make(g, w->driver, sw, &s, &limits, &p);

                if (rc < 0)
                        return rc;
                if (details && workload_turns(w) > 1)
                        fprintf(details, "turn %u\n", t + 1);
                if (details)
                        plan_print(details, &p);
                out->up.payload_bytes += p.up.payload_bytes;
                out->down.payload_bytes += p.down.payload_bytes;
                out->round_trips += p.round_trips;
                out->flop += p.work.flop;
                out->bytes += p.work.bytes;
                plan_free(&p);
        }
        return 0;
}

static int build(const struct sweep_opts *o, const struct workload_spec *spec, struct workload *w, struct graph *blind)
{
        struct model_roots *roots = NULL;
        struct workload_opts wo = {.dtype = o->exp->dtype, .require_weights = o->require_weights, .seed = o->exp->seed};
        int rc;

        if (spec->kind && spec->kind->reason)
                return err_set(-ENOTSUP, "%s", spec->kind->reason);
        rc = model_roots_open(o->model_roots, o->nmodel_roots, &roots);
        if (rc < 0)
                return rc;
        wo.roots = roots;
        rc = workload_build(spec, &wo, w);
        model_roots_close(roots);
        if (rc < 0)
                return rc;
        rc = graph_clone(&w->graph, blind);
        if (rc < 0) {
                workload_free(w);
                return rc;
        }
        graph_blind(blind);
        return 0;
}

/* Seconds for all blocks of a row: its requests, the untimed one, warm-up, and a calibration that waits as long. */
static double rough_seconds(const struct experiment *e, const struct prediction *p, bool native)
{
        double one = fmax(p->flop / ROUGH_FLOP_PER_S, p->bytes / ROUGH_BYTES_PER_S) +
                     (native ? 0
                             : (double)(p->up.payload_bytes + p->down.payload_bytes) / ROUGH_BYTES_PER_S +
                                   (double)p->round_trips * ROUGH_ROUND_TRIP_S);
        double per_block = (double)e->requests_per_block + 1 + (native ? 0 : fmax((double)e->requests_per_block, 3));

        return one * (per_block * (double)e->runs + (double)e->warmup_runs + 9);
}

/* What --check has found so far. */
struct forecast {
        double seconds;
        int rc; /* the first error that is no reason to skip; its sentence is why */
        char why[ERR_TEXT_MAX];
};

/* What cannot be done in this version is skipped; everything else would go wrong when it is run. */
static void cannot(struct forecast *f, int rc, const char *what, FILE *to)
{
        fprintf(to, "%s %s: %s\n", what, rc == -ENOTSUP ? "SKIPPED" : "error", err_text());
        if (rc == -ENOTSUP || f->rc < 0)
                return;
        f->rc = rc;
        snprintf(f->why, sizeof f->why, "%s", err_text());
}

static void print_row(FILE *to, const char *name, bool native, const struct prediction *p, uint32_t turns)
{
        if (native)
                fprintf(to, "  %-18s in the server's process, no wire\n", name);
        else
                fprintf(to, "  %-18s %llu round trips, payload up %llu B, down %llu B per request%s\n", name,
                        (unsigned long long)(p->round_trips / turns), (unsigned long long)(p->up.payload_bytes / turns),
                        (unsigned long long)(p->down.payload_bytes / turns), turns > 1 ? " (mean over the turns)" : "");
}

static void check_rows(const struct sweep_opts *o, const struct workload *w, const struct graph *blind,
                       struct forecast *f, FILE *to)
{
        const struct experiment *e = o->exp;

        for (size_t i = 0; i < e->nbaselines; i++) {
                const struct exp_baseline *b = &e->baselines[i];
                bool native = b->def && b->sw.buffers == SW_IN_PROCESS;
                struct prediction p;
                char name[96];
                int rc;

                if (!exp_wanted(b->name, o->baselines, o->nbaselines))
                        continue;
                if (b->def && b->def->external) {
                        fprintf(to, "  %-18s %s %s\n", b->name, b->command[0],
                                o->allow_external ? "does it in its own way; nothing is predicted"
                                                  : "would be started: SKIPPED without --allow-external");
                        continue;
                }
                if (b->skip) {
                        fprintf(to, "  %-18s SKIPPED: %s\n", b->name, b->skip);
                        continue;
                }
                rc = predict(w, b->sw.blind ? blind : &w->graph, &b->sw, &p, NULL);
                if (rc < 0) {
                        snprintf(name, sizeof name, "  %-18s", b->name);
                        cannot(f, rc, name, to);
                        continue;
                }
                print_row(to, b->name, native, &p, workload_turns(w));
                f->seconds += rough_seconds(e, &p, native) * (native ? 1 : (double)e->ntransports);
        }
}

int sweep_check(const struct sweep_opts *opts, FILE *to)
{
        const struct experiment *e = opts->exp;
        struct forecast f = {0};

        fprintf(to, "%s: %lld blocks of %lld requests per row, device %s, %s, over", e->config_path, (long long)e->runs,
                (long long)e->requests_per_block, e->device, op_dtype_names[e->dtype]);
        for (size_t t = 0; t < e->ntransports; t++)
                fprintf(to, " %s", e->transports[t]);
        fputs("\n", to);
        for (size_t i = 0; i < e->nworkloads; i++) {
                struct workload w;
                struct graph blind;
                char name[96];
                int rc;

                if (!exp_wanted(e->workloads[i].name, opts->workloads, opts->nworkloads))
                        continue;
                rc = build(opts, &e->workloads[i], &w, &blind);
                if (rc < 0) {
                        snprintf(name, sizeof name, "%s:", e->workloads[i].name);
                        cannot(&f, rc, name, to);
                        continue;
                }
                fprintf(to, "%s: weights %s\n", w.spec.name,
                        !w.has_weights                    ? "none"
                        : w.weights == WEIGHTS_CHECKPOINT ? w.model_path
                                                          : "synthetic");
                check_rows(opts, &w, &blind, &f, to);
                graph_free(&blind);
                workload_free(&w);
        }
        fprintf(to, "about %.0f s on a host that computes %.0f GFLOP/s and moves %.0f GB/s\n", ceil(f.seconds),
                ROUGH_FLOP_PER_S / 1e9, ROUGH_BYTES_PER_S / 1e9);
        return f.rc < 0 ? err_set(f.rc, "%s", f.why) : 0;
}

static const struct exp_baseline *find_baseline(const struct experiment *e, const char *name, struct exp_baseline *own)
{
        const struct baseline_def *def;

        for (size_t i = 0; i < e->nbaselines; i++)
                if (!strcmp(e->baselines[i].name, name))
                        return &e->baselines[i];
        def = baseline_find(name);
        if (!def)
                return NULL;
        *own =
            (struct exp_baseline){.name = def->name, .type = def->name, .def = def, .skip = def->reason, .sw = def->sw};
        return own;
}

int sweep_plan(const struct sweep_opts *opts, const char *workload, const char *baseline, FILE *to)
{
        const struct experiment *e = opts->exp;
        const struct exp_baseline *b;
        struct exp_baseline own;
        struct prediction p;
        struct workload w;
        struct graph blind;
        size_t i = 0;
        int rc;

        while (i < e->nworkloads && strcmp(e->workloads[i].name, workload))
                i++;
        if (i == e->nworkloads)
                return err_set(-EINVAL, "%s has no workload \"%s\"", e->config_path, workload);
        b = find_baseline(e, baseline, &own);
        if (!b)
                return err_set(-EINVAL, "neither %s nor this program has a baseline \"%s\"", e->config_path, baseline);
        if (b->skip)
                return err_set(-ENOTSUP, "%s: %s", baseline, b->skip);
        if (b->def->external)
                return err_set(-ENOTSUP, "%s: a program of its own does the work; there is no plan of it here",
                               baseline);
        rc = build(opts, &e->workloads[i], &w, &blind);
        if (rc < 0)
                return rc;
        fprintf(to, "%s, %s\n", w.spec.name, b->name);
        rc = predict(&w, b->sw.blind ? &blind : &w.graph, &b->sw, &p, to);
        graph_free(&blind);
        workload_free(&w);
        return rc;
}
