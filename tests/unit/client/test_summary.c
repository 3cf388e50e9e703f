/* The arithmetic of a row, on samples made by hand: what adds up, what is left out, and what each verdict is given for. */
#include "client_fixture.h"

#include "baseline.h"
#include "prng.h"
#include "rows.h"

#define BLOCKS 9u
#define NATIVE 0
#define REMOTE 1

/* A native row and a full_djinn row over shm, one request and one calibration per block and turn. */
struct scene {
        struct experiment exp;
        struct sweep_opts opts;
        struct exp_baseline base[2];
        struct row rows[2];
        struct measured me;
        struct graph g;
        struct plan plans[2][3];
        uint32_t launch[BLOCKS];
        struct remote remote;
        struct remote_model model;
};

static void scene_rows(struct scene *s, uint32_t per_block, uint32_t turns)
{
        static const char *const names[] = {"native_pytorch", "full_djinn"};

        for (int i = 0; i < 2; i++) {
                const struct baseline_def *def = baseline_find(names[i]);
                struct row *r = &s->rows[i];

                s->base[i] = (struct exp_baseline){.name = names[i], .type = names[i], .def = def, .sw = def->sw};
                *r = (struct row){.b = &s->base[i],
                                  .transport = i ? "shm" : "local",
                                  .twin_of = -1,
                                  .steady = true,
                                  .plans = s->plans[i],
                                  .r = &s->remote,
                                  .m = &s->model,
                                  .wire_floor_ns = NAN,
                                  .check = {.done = true, .passed = true, .digest_sensitive = true}};
                snprintf(r->name, sizeof(r->name), "%s", names[i]);
                r->samples = calloc((size_t)BLOCKS * per_block * turns, sizeof *r->samples);
                r->nets = calloc((size_t)BLOCKS * turns, sizeof *r->nets);
                r->digests = calloc(BLOCKS, sizeof *r->digests);
                for (uint32_t b = 0; b < BLOCKS; b++)
                        r->digests[b] = (struct digest){b + 1, 7};      /* all zeros: none was taken */
        }
}

/* Leaves of 1 to 20 µs at random, a residual of some ns, a latency that is their sum. */
static struct exec_sample random_sample(struct prng *rng, uint32_t applied)
{
        struct exec_sample x = {.applied = applied};

        for (int l = 0; l < LEAF_COUNT; l++) {
                x.leaf_ns[l] = 1000 + (int64_t)(prng_u64(rng) % 19000);
                x.latency_ns += (uint64_t)x.leaf_ns[l];
        }
        x.residual_ns = (int64_t)(prng_u64(rng) % 100);
        x.latency_ns += (uint64_t)x.residual_ns;
        return x;
}

static void scene_make(struct scene *s, uint32_t per_block, uint32_t turns)
{
        struct prng rng;

        *s = (struct scene){.exp = {.reference_baseline = "native_pytorch", .seed = 3}};
        s->opts.exp = &s->exp;
        s->g = gpt2_graph(&gpt2_micro, 1, 64, DT_F32);
        prng_seed(&rng, 7);
        scene_rows(s, per_block, turns);
        for (int i = 0; i < 2; i++) {
                struct row *r = &s->rows[i];

                for (uint32_t t = 0; t < turns; t++) {
                        const struct plan_shape shape = {
                            .history = 8 + 6 * t, .cached = t ? 6 * t + 5 : 0, .new_tokens = 4};

                        must(plan_make(&s->g, DRIVE_CAUSAL, &s->base[i].sw, &shape, &(struct plan_limits){65536, 16384},
                                       &s->plans[i][t]));
                }
                for (uint32_t b = 0; b < BLOCKS; b++)
                        for (uint32_t t = 0; t < turns; t++) {
                                for (uint32_t k = 0; k < per_block; k++)
                                        r->samples[r->nsamples++] =
                                            (struct sample){.block = b,
                                                            .turn = t,
                                                            .digest_ok = true,
                                                            .s = random_sample(&rng, s->plans[i][t].calls[0].run.h.flags)};
                                r->nets[r->nnets++] = (struct net_sample){b, t, 500 + prng_u64(&rng) % 9000};
                        }
                for (uint32_t t = 0; t < turns; t++) {
                        const struct plan *p = &s->plans[i][t];
                        uint64_t n = r->nsamples / turns;

                        r->wire.up_messages += n * p->up.messages, r->wire.up_msg_bytes += n * p->up.msg_bytes;
                        r->wire.up_bulk_bytes += n * p->up.bulk_bytes, r->wire.down_messages += n * p->down.messages;
                        r->wire.down_msg_bytes += n * p->down.msg_bytes,
                            r->wire.down_bulk_bytes += n * p->down.bulk_bytes;
                }
        }
        s->me = (struct measured){
            .opts = &s->opts, .rows = s->rows, .nrows = 2, .turns = turns, .blocks = BLOCKS, .launch = s->launch};
}

static void scene_free(struct scene *s)
{
        for (int i = 0; i < 2; i++) {
                for (uint32_t t = 0; t < s->me.turns; t++)
                        plan_free(&s->plans[i][t]);
                free(s->rows[i].samples);
                free(s->rows[i].nets);
                free(s->rows[i].digests);
        }
        graph_free(&s->g);
}

/* ---- latency - native = network + extra execution + framework ---- */

static void columns(const struct scene *s, double lat[], double nat[], double net[], double exec[], double nexec[],
                    double wire[])
{
        row_block_values(&s->me, &s->rows[REMOTE], Q_LATENCY, lat);
        row_block_values(&s->me, &s->rows[NATIVE], Q_LATENCY, nat);
        row_block_values(&s->me, &s->rows[REMOTE], Q_NETWORK, net);
        row_block_values(&s->me, &s->rows[REMOTE], Q_EXECUTION, exec);
        row_block_values(&s->me, &s->rows[NATIVE], Q_EXECUTION, nexec);
        row_block_values(&s->me, &s->rows[REMOTE], Q_C2S_S2C, wire);
}

static void every_block_adds_up(void **state)
{
        double lat[BLOCKS], nat[BLOCKS], net[BLOCKS], exec[BLOCKS], nexec[BLOCKS], wire[BLOCKS];
        double delta[BLOCKS], extra[BLOCKS], fw[BLOCKS], diff[BLOCKS];
        struct decomposition d;
        struct scene s;

        scene_make(&s, 1, 1);
        columns(&s, lat, nat, net, exec, nexec, wire);
        for (uint32_t b = 0; b < BLOCKS; b++) {
                const struct exec_sample *r = &s.rows[REMOTE].samples[b].s, *n = &s.rows[NATIVE].samples[b].s;

                assert_close(lat[b], (double)r->latency_ns, 0);
                assert_close(nat[b], (double)n->latency_ns, 0);
                assert_close(net[b], (double)s.rows[REMOTE].nets[b].ns, 0);
                assert_close(exec[b], (double)r->leaf_ns[LEAF_SERVER_EXECUTION], 0);
                assert_close(wire[b], (double)(r->leaf_ns[LEAF_NETWORK_C2S] + r->leaf_ns[LEAF_NETWORK_S2C]), 0);
                delta[b] = lat[b] - nat[b];
                extra[b] = exec[b] - nexec[b];
                fw[b] = delta[b] - net[b] - extra[b];
                diff[b] = wire[b] - net[b];
        }
        row_decompose(&s.me, &s.rows[REMOTE], &d);
        assert_true(d.comparable);
        assert_close(d.latency.value, stats_median(lat, BLOCKS), 0);
        assert_close(d.native.value, stats_median(nat, BLOCKS), 0);
        assert_close(d.delta.value, stats_median(delta, BLOCKS), 0);
        assert_close(d.network.value, stats_median(net, BLOCKS), 0);
        assert_close(d.extra_execution.value, stats_median(extra, BLOCKS), 0);
        assert_close(d.framework.value, stats_median(fw, BLOCKS), 1e-6);
        assert_close(d.network_difference.value, stats_median(diff, BLOCKS), 0);
        assert_true(d.framework.ci95.known && d.framework.ci95.lo <= d.framework.value &&
                    d.framework.value <= d.framework.ci95.hi);
        scene_free(&s);
}

static void equal_blocks_add_up_exactly(void **state)
{
        struct decomposition d;
        struct scene s;

        scene_make(&s, 1, 1);
        for (int i = 0; i < 2; i++)
                for (uint32_t b = 1; b < BLOCKS; b++) {
                        s.rows[i].samples[b].s = s.rows[i].samples[0].s;
                        s.rows[i].nets[b].ns = s.rows[i].nets[0].ns;
                }
        row_decompose(&s.me, &s.rows[REMOTE], &d);
        assert_close(d.delta.value, d.network.value + d.extra_execution.value + d.framework.value, 1e-6);
        assert_close(d.latency.value, d.native.value + d.delta.value, 1e-6);
        scene_free(&s);
}

/* Native has nothing to be compared with; a row without native has a latency and a network, but no difference. */
static void without_the_other_side(void **state)
{
        struct decomposition d;
        struct scene s;

        scene_make(&s, 1, 1);
        row_decompose(&s.me, &s.rows[NATIVE], &d);
        assert_false(d.comparable);
        assert_false(isnan(d.latency.value));
        assert_true(isnan(d.delta.value) && isnan(d.framework.value) && isnan(d.network.value));
        s.exp.reference_baseline = "somebody_else";
        assert_null(measured_native(&s.me, &s.rows[REMOTE]));
        row_decompose(&s.me, &s.rows[REMOTE], &d);
        assert_false(d.comparable);
        assert_false(isnan(d.latency.value) || isnan(d.network.value));
        assert_true(isnan(d.delta.value) && isnan(d.framework.value) && isnan(d.native.value));
        scene_free(&s);
}

/* A block that lacks a calibration takes no part, in any column. */
static void only_whole_blocks_count(void **state)
{
        double lat[BLOCKS];
        struct decomposition d;
        struct scene s;

        scene_make(&s, 1, 1);
        s.rows[REMOTE].nets[4].block = 77;
        row_block_values(&s.me, &s.rows[REMOTE], Q_NETWORK, lat);
        assert_true(isnan(lat[4]));
        row_block_values(&s.me, &s.rows[REMOTE], Q_LATENCY, lat);
        lat[4] = lat[BLOCKS - 1];
        row_decompose(&s.me, &s.rows[REMOTE], &d);
        assert_close(d.latency.value, stats_median(lat, BLOCKS - 1), 0);
        scene_free(&s);
}

static void block_values_are_medians_then_means_over_turns(void **state)
{
        static const uint64_t ns[3][3] = {{10, 30, 20}, {100, 300, 900}, {7, 7, 7}};
        double v[BLOCKS];
        struct scene s;

        scene_make(&s, 3, 3);
        for (uint32_t t = 0; t < 3; t++)
                for (uint32_t k = 0; k < 3; k++)
                        s.rows[REMOTE].samples[t * 3 + k].s.latency_ns = ns[t][k];
        row_block_values(&s.me, &s.rows[REMOTE], Q_LATENCY, v);
        assert_close(v[0], (20 + 300 + 7) / 3.0, 1e-9);
        scene_free(&s);
}

/* ---- breakdown ---- */

static void breakdown_sums(void **state)
{
        struct breakdown bd;
        struct scene s;

        scene_make(&s, 5, 3);
        for (int i = 0; i < 2; i++) {
                double sum;

                row_breakdown(&s.me, &s.rows[i], &bd);
                sum = bd.residual;
                for (int l = 0; l < LEAF_COUNT; l++)
                        sum += bd.leaf[l];
                assert_close(sum, bd.latency, 1e-6);
                assert_int_equal(bd.n, s.rows[i].nsamples - 3 * 2 * (s.rows[i].nsamples / 3 / 4));
        }
        scene_free(&s);
}

static void breakdown_leaves_the_tails_out(void **state)
{
        static const uint64_t ns[] = {1000000, 50, 10, 40, 20, 30, 2, 900000};
        struct breakdown bd;
        struct scene s;

        scene_make(&s, 1, 1);
        s.rows[REMOTE].nsamples = ARRAY_LEN(ns);
        for (size_t i = 0; i < ARRAY_LEN(ns); i++) {
                s.rows[REMOTE].samples[i].s = (struct exec_sample){.latency_ns = ns[i], .first_token_ns = ns[i] / 2};
                s.rows[REMOTE].samples[i].s.leaf_ns[LEAF_CLIENT_STEP] = (int64_t)ns[i];
        }
        row_breakdown(&s.me, &s.rows[REMOTE], &bd);
        assert_int_equal(bd.n, 4);
        assert_close(bd.latency, (20 + 30 + 40 + 50) / 4.0, 1e-9);
        assert_close(bd.leaf[LEAF_CLIENT_STEP], 35, 1e-9);
        assert_close(bd.first_token, 17.5, 1e-9);
        s.rows[REMOTE].nsamples = 0;
        row_breakdown(&s.me, &s.rows[REMOTE], &bd);
        assert_int_equal(bd.n, 0);
        scene_free(&s);
}

/* ---- verdicts ---- */

static void assert_verdict(struct scene *s, int row, enum verdict want, const char *word)
{
        struct row *r = &s->rows[row];

        row_judge(&s->me, r);
        if (r->verdict != want || (word && !strstr(r->reason, word)) || (!word && *r->reason))
                fail_msg("%s \"%s\", expected %s \"%s\"", verdict_names[r->verdict], r->reason, verdict_names[want],
                         word ? word : "");
}

static void sound_rows_are_valid(void **state)
{
        struct scene s;

        for (uint32_t turns = 1; turns <= 3; turns++) {
                scene_make(&s, 2, turns);
                assert_verdict(&s, NATIVE, VERDICT_VALID, NULL);
                assert_verdict(&s, REMOTE, VERDICT_VALID, NULL);
                scene_free(&s);
        }
}

/* One fault each, in a row that is sound otherwise. */
struct fault {
        const char *name;
        void (*make)(struct scene *s, struct row *r);
        enum verdict verdict;
        const char *word;
};

#define FAULT(name, code)                                \
        static void name(struct scene *s, struct row *r) \
        {                                                \
                code;                                    \
        }
FAULT(no_check, r->check.done = false)
FAULT(check_failed, r->check.passed = false; strcpy(r->check.why, "logits of step 3 differ"))
FAULT(digest_error, r->digest_errors = 2)
FAULT(one_message_more, r->wire.up_messages++)
FAULT(one_byte_more_up, r->wire.up_msg_bytes++)
FAULT(one_byte_less_written, r->wire.up_bulk_bytes--)
FAULT(one_answer_less, r->wire.down_messages--)
FAULT(one_byte_more_down, r->wire.down_msg_bytes++)
FAULT(one_byte_less_back, r->wire.down_bulk_bytes--)
FAULT(other_bits, r->digests[5].lo ^= 1)
FAULT(not_steady, r->steady = false; r->warm_requests = 42)
FAULT(few_blocks, s->me.blocks = 5)

static void all_residuals(struct row *r, int64_t ns, int64_t server_ns)
{
        for (size_t i = 0; i < r->nsamples; i++) {
                r->samples[i].s.latency_ns += (uint64_t)(ns - r->samples[i].s.residual_ns);
                r->samples[i].s.residual_ns = ns;
                r->samples[i].s.server_residual_ns = server_ns;
        }
}

FAULT(residual_over, all_residuals(r, 5100, 0))
FAULT(server_residual_over, all_residuals(r, 0, -5100))
FAULT(residual_under, all_residuals(r, 4900, -4900))

static void each_fault_has_its_verdict(void **state)
{
        static const struct fault faults[] = {
            {"no check", no_check, VERDICT_INVALID, "the check pass did not run"},
            {"check failed", check_failed, VERDICT_INVALID, "not the same job: logits of step 3 differ"},
            {"digest", digest_error, VERDICT_INVALID, "2 of 18 timed results differ from the untimed one"},
            {"message more", one_message_more, VERDICT_INVALID, "counters differ from the plan"},
            {"byte up", one_byte_more_up, VERDICT_INVALID, "counters differ from the plan"},
            {"written", one_byte_less_written, VERDICT_INVALID, "counters differ from the plan"},
            {"answer", one_answer_less, VERDICT_INVALID, "counters differ from the plan"},
            {"byte down", one_byte_more_down, VERDICT_INVALID, "counters differ from the plan"},
            {"back", one_byte_less_back, VERDICT_INVALID, "counters differ from the plan"},
            {"bits", other_bits, VERDICT_INVALID, "the result of block 5 differs from that of native_pytorch"},
            {"residual", residual_over, VERDICT_INVALID, "do not add up: residual 5.1 us"},
            {"server residual", server_residual_over, VERDICT_INVALID, "server residual 5.1 us"},
            {"residual within", residual_under, VERDICT_VALID, NULL},
            {"steady", not_steady, VERDICT_UNSTEADY, "not steady after 42 warm-up requests"},
            {"few", few_blocks, VERDICT_FEW, "5 blocks; an interval needs 6"},
        };

        for (size_t i = 0; i < ARRAY_LEN(faults); i++) {
                struct scene s;

                scene_make(&s, 2, 1);
                faults[i].make(&s, &s.rows[REMOTE]);
                assert_verdict(&s, REMOTE, faults[i].verdict, faults[i].word);
                scene_free(&s);
        }
}

/* 2 % of a long latency may be more than 5 µs, and 5 µs are allowed for each round trip. */
static void residual_limit_grows(void **state)
{
        struct scene s;

        scene_make(&s, 2, 1);
        for (size_t i = 0; i < s.rows[REMOTE].nsamples; i++) {
                struct exec_sample *x = &s.rows[REMOTE].samples[i].s;

                x->leaf_ns[LEAF_SERVER_EXECUTION] += 1000000;
                x->latency_ns += 1000000;
        }
        all_residuals(&s.rows[REMOTE], 19000, 0);
        assert_verdict(&s, REMOTE, VERDICT_VALID, NULL);
        all_residuals(&s.rows[REMOTE], 30000, 0);
        assert_verdict(&s, REMOTE, VERDICT_INVALID, "do not add up");
        scene_free(&s);
        scene_make(&s, 2, 1);
        s.plans[REMOTE][0].round_trips = 4;
        all_residuals(&s.rows[REMOTE], 19000, 0);
        assert_verdict(&s, REMOTE, VERDICT_VALID, NULL);
        scene_free(&s);
}

/* What went wrong earlier stands; a local row sends nothing, so nothing of its counters is looked at. */
static void what_is_not_judged(void **state)
{
        struct scene s;

        scene_make(&s, 2, 1);
        s.rows[REMOTE].verdict = VERDICT_SKIPPED;
        strcpy(s.rows[REMOTE].reason, "needs Ray");
        s.rows[REMOTE].check.passed = false;
        assert_verdict(&s, REMOTE, VERDICT_SKIPPED, "needs Ray");
        s.rows[REMOTE].verdict = VERDICT_INVALID;
        assert_verdict(&s, REMOTE, VERDICT_INVALID, "needs Ray");
        s.rows[NATIVE].wire.up_messages = 0;
        assert_verdict(&s, NATIVE, VERDICT_VALID, NULL);
        scene_free(&s);
}

static void injured_rows_say_so(void **state)
{
        struct scene s;

        unsetenv("DJINN_INJURE_KEEP");
        injury = (struct injury){.active = true, .payload_bytes = 1000};
        scene_make(&s, 2, 1);
        assert_verdict(&s, NATIVE, VERDICT_INVALID, "injured on purpose");
        setenv("DJINN_INJURE_KEEP", "1", 1);
        assert_verdict(&s, REMOTE, VERDICT_INVALID, "counters differ");
        s.rows[REMOTE].verdict = VERDICT_VALID;
        s.rows[REMOTE].reason[0] = '\0';
        s.rows[REMOTE].wire.up_bulk_bytes += 1000 * s.rows[REMOTE].nsamples;
        assert_verdict(&s, REMOTE, VERDICT_VALID, NULL);
        unsetenv("DJINN_INJURE_KEEP");
        injury = (struct injury){0};
        scene_free(&s);
}

static void stamps_out_of_order_are_seen(void **state)
{
        struct scene s;

        scene_make(&s, 2, 1);
        s.rows[REMOTE].samples[0].s.disordered = true;
        assert_verdict(&s, REMOTE, VERDICT_INVALID, "out of order");
        scene_free(&s);
}

static void other_switches_are_seen(void **state)
{
        struct scene s;

        scene_make(&s, 2, 1);
        s.rows[REMOTE].samples[3].s.applied &= ~RUN_PLAN_CACHE;
        assert_verdict(&s, REMOTE, VERDICT_INVALID, "other switches");
        scene_free(&s);
}

/* ---- sums over turns ---- */

static void turns_are_summed(void **state)
{
        struct plan_bytes up, down;
        uint64_t trips;
        double tokens;
        struct graph_cost cost;
        struct scene s;

        scene_make(&s, 1, 3);
        row_predicted(&s.me, &s.rows[REMOTE], &up, &down, &trips);
        cost = row_work(&s.me, &s.rows[REMOTE], &tokens);
        assert_int_equal(trips, 3);
        assert_int_equal(up.payload_bytes, (8 + 3 + 3) * 4 + 3 * 8);
        assert_int_equal(down.payload_bytes, 3 * 4 * 4);
        assert_true(tokens == (8 + 3) + (3 + 3) + (3 + 3));
        assert_true(cost.flop > 0 && cost.head_flop == 12.0 * 2 * 64 * 512);
        scene_free(&s);
}

static void rows_are_found(void **state)
{
        struct scene s;

        scene_make(&s, 1, 1);
        assert_ptr_equal(measured_native(&s.me, &s.rows[REMOTE]), &s.rows[NATIVE]);
        assert_ptr_equal(measured_find(&s.me, &s.rows[REMOTE], "full_djinn"), &s.rows[REMOTE]);
        assert_null(measured_find(&s.me, &s.rows[REMOTE], "other"));
        assert_null(measured_find(&s.me, &s.rows[NATIVE], "full_djinn"));       /* over another transport */
        s.rows[NATIVE].verdict = VERDICT_INVALID;
        assert_null(measured_native(&s.me, &s.rows[REMOTE]));
        s.rows[NATIVE].verdict = VERDICT_VALID;
        struct remote other = {.server = {.threads = 7}};

        s.rows[NATIVE].r = &other;
        assert_null(measured_native(&s.me, &s.rows[REMOTE]));
        s.rows[NATIVE].r = &s.remote;
        s.rows[REMOTE].nsamples = s.rows[NATIVE].nsamples = 0;
        assert_null(measured_find(&s.me, &s.rows[REMOTE], "full_djinn"));
        assert_null(measured_native(&s.me, &s.rows[REMOTE]));
        scene_free(&s);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(every_block_adds_up),
            cmocka_unit_test(equal_blocks_add_up_exactly),
            cmocka_unit_test(without_the_other_side),
            cmocka_unit_test(only_whole_blocks_count),
            cmocka_unit_test(block_values_are_medians_then_means_over_turns),
            cmocka_unit_test(breakdown_sums),
            cmocka_unit_test(breakdown_leaves_the_tails_out),
            cmocka_unit_test(sound_rows_are_valid),
            cmocka_unit_test(each_fault_has_its_verdict),
            cmocka_unit_test(residual_limit_grows),
            cmocka_unit_test(what_is_not_judged),
            cmocka_unit_test(injured_rows_say_so),
            cmocka_unit_test(stamps_out_of_order_are_seen),
            cmocka_unit_test(other_switches_are_seen),
            cmocka_unit_test(turns_are_summed),
            cmocka_unit_test(rows_are_found),
        };

        return cmocka_run_group_tests_name("summary", tests, NULL, NULL);
}
