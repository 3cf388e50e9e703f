/* perf: what was measured, as JSON for programs (SPEC: djinnbench.perf/1). */
#include <math.h>
#include <string.h>

#include "check.h"
#include "clock.h"
#include "manifest.h"
#include "perf_inside.h"
#include "stats.h"

static double us(double ns)
{
        return ns / 1e3;
}

static json *histogram_json(const struct hist *h)
{
        json *list = json_array();

        for (unsigned i = 0; i < HIST_BUCKETS; i++) {
                uint64_t low = i;
                json *pair;

                if (!h->bucket[i])
                        continue;
                if (i >= HIST_SUB)
                        low = (uint64_t)(HIST_SUB + i % HIST_SUB) << (i / HIST_SUB - 1);
                pair = json_array();
                json_push(pair, json_of_int((int64_t)low));
                json_push(pair, json_of_int((int64_t)h->bucket[i]));
                json_push(list, pair);
        }
        return list;
}

static json *interval_json(struct interval ci, double scale)
{
        json *list;

        if (!ci.known)
                return json_of_null();
        list = json_array();
        json_push(list, json_of_num(ci.lo * scale));
        json_push(list, json_of_num(ci.hi * scale));
        return list;
}

static json *latency_json(const struct perf_row *row, const struct hist *h, double part, bool interval)
{
        json *j = json_object();

        json_set_num(j, "min", h->n ? us((double)h->min * part) : NAN);
        for (int i = 0; i < PERF_QUANTILES; i++)
                json_set_num(j, perf_quantiles[i].key, us(hist_percentile(h, perf_quantiles[i].p) * part));
        json_set_num(j, "max", h->n ? us((double)h->max * part) : NAN);
        json_set_int(j, "n", (int64_t)h->n);
        json_set(j, "ci95",
                 interval ? interval_json(stats_median_ci95(row->replicate, row->replicates), part / 1e3)
                          : json_of_null());
        return j;
}

static void set_latencies(json *j, const struct perf_result *r, const struct perf_row *row)
{
        bool lat = row->test == PERF_LAT, open = r->o->rate > 0 && !row->raw;
        double part = perf_part(r->o, row->op);
        json *whole = lat ? latency_json(row, &row->sum.hist, part, true) : json_of_null();

        json_set(j, "half_rtt_us", lat && part < 1 ? whole : json_of_null());
        json_set(j, "rtt_us", lat && part < 1 ? json_of_null() : whole);
        json_set(j, "rtt_uncorrected_us",
                 lat && open ? latency_json(row, &row->sum.uncorrected, part, false) : json_of_null());
}

static json *one_way_json(const struct perf_one_way *w)
{
        json *j;

        if (!w->known)
                return json_of_null();
        j = json_object();
        json_set_num(j, "p50", us(w->p50_ns));
        json_set_num(j, "min", us(w->min_ns));
        json_set_num(j, "max", us(w->max_ns));
        json_set_int(j, "n", (int64_t)w->n);
        json_set_num(j, "clock_error_us", us(w->error_ns));
        json_set_bool(j, "same_clock", w->same_clock);
        return j;
}

static json *replicates_json(const struct perf_result *r, const struct perf_row *row)
{
        bool lat = row->test == PERF_LAT;
        double part = perf_part(r->o, row->op),
               bytes = row->sum.iterations ? (double)row->sum.bytes / (double)row->sum.iterations : 0;
        json *list = json_array();

        for (size_t i = 0; i < row->replicates; i++) {
                json *one = json_object();

                if (lat) {
                        json_set_num(one, part < 1 ? "half_rtt_p50_us" : "rtt_p50_us", us(row->replicate[i] * part));
                        for (int q = 1; q < PERF_QUANTILES; q++) {
                                char key[32];

                                snprintf(key, sizeof(key), "%s_%s_us", part < 1 ? "half_rtt" : "rtt",
                                         perf_quantiles[q].key);
                                json_set_num(one, key, us(row->tails[i][q] * part));
                        }
                } else {
                        json_set_num(one, "messages_s", row->replicate[i]);
                        json_set_num(one, "gbytes_s", row->replicate[i] * bytes / 1e9);
                }
                json_push(list, one);
        }
        return list;
}

static json *cpu_json(const struct perf_row *row)
{
        double gb = (double)row->sum.bytes * (row->test == PERF_LAT && row->op != PERF_READ ? 2 : 1) / 1e9;
        json *j = json_object();

        json_set_num(j, "local", gb > 0 ? (double)row->sum.cpu_local_ns / 1e9 / gb : NAN);
        json_set_num(j, "peer", gb > 0 ? (double)row->sum.cpu_peer_ns / 1e9 / gb : NAN);
        return j;
}

static json *counters_json(const struct perf_row *row)
{
        json *j = json_object();

        json_set(j, "local", row->counters_local ? json_copy(row->counters_local) : json_of_null());
        json_set(j, "peer", row->counters_peer ? json_copy(row->counters_peer) : json_of_null());
        return j;
}

static json *versus_json(const struct perf_result *r, size_t i)
{
        const struct perf_row *a = r->rows[i], *b = i + 1 < r->n_rows ? r->rows[i + 1] : NULL;
        struct perf_versus v;
        json *j;

        if (a->raw || !b || !b->raw || b->size != a->size || !perf_versus(r->o, a, b, &v))
                return json_of_null();
        j = json_object();
        json_set_num(j, "ratio", v.ratio.value);
        json_set(j, "ratio_ci95", interval_json(v.ratio.ci95, 1));
        json_set_num(j, "diff_ns", v.diff_ns.value);
        json_set(j, "diff_ci95_ns", interval_json(v.diff_ns.ci95, 1));
        return j;
}

static void warn_push(void *to, const char *text)
{
        json_push(to, json_of_str(text));
}

static void set_what(json *j, const struct perf_result *r, const struct perf_row *row)
{
        const struct perf_opts *o = r->o;
        const struct perf_measure *m = &row->sum;

        json_set_str(j, "transport", r->info.transport);
        json_set_str(j, "path", row->raw ? "raw" : r->info.path);
        json_set_bool(j, "raw", row->raw);
        json_set_bool(j, "emulated", r->info.attr.emulated);
        json_set_str(j, "op", perf_op_names[row->op]);
        json_set_str(j, "test", perf_test_names[row->test]);
        json_set_int(j, "size",
                     row->size->mixed && m->iterations ? (int64_t)(m->bytes / m->iterations) : (int64_t)row->size->lo);
        json_set_str(j, "size_spec", row->size->text);
        json_set_bool(j, "size_mixed", row->size->mixed);
        json_set_int(j, "depth", row->window);
        json_set_int(j, "slots", row->slots);
        json_set_int(j, "footprint_bytes",
                     (int64_t)(perf_stride(row->size->hi) * row->slots * (uint64_t)o->connections));
        json_set_int(j, "region_bytes", (int64_t)row->region_bytes);
        json_set_int(j, "connections", o->connections);
        json_set_int(j, "threads", o->threads);
        json_set_bool(j, "bidirectional", o->bidirectional);
        json_set_int(j, "iterations", (int64_t)m->iterations);
}

static void set_rates(json *j, const struct perf_result *r, const struct perf_row *row)
{
        bool lat = row->test == PERF_LAT, open = r->o->rate > 0 && !row->raw;
        double link = r->info.attr.link_bits_per_s;

        json_set_num(j, "offered_s", open ? r->o->rate : NAN);
        json_set_num(j, "achieved_s", open ? perf_row_rate(row) : NAN);
        json_set_num(j, "gbytes_s", lat ? NAN : perf_row_gbytes(row));
        json_set_num(j, "gbits_s", lat ? NAN : perf_row_gbytes(row) * 8);
        json_set_num(j, "messages_s", lat ? NAN : perf_row_rate(row));
        json_set_num(j, "local_completion_gbytes_s",
                     lat || row->raw || r->o->bidirectional || !row->sum.local_ns
                         ? NAN
                         : (double)row->sum.bytes / (double)row->sum.local_ns);
        json_set_num(j, "link_gbits_s", link > 0 ? link / 1e9 : NAN);
}

static json *row_json(const struct perf_result *r, size_t i)
{
        const struct perf_row *row = r->rows[i];
        const struct perf_measure *m = &row->sum;
        bool lat = row->test == PERF_LAT, verified = r->o->verify && !row->raw;
        double all = (double)m->bytes * (lat && row->op != PERF_READ ? 2 : 1),
               scale = lat ? perf_part(r->o, row->op) / 1e3 : 1;
        json *j = json_object(), *list = json_array();

        set_what(j, r, row);
        set_latencies(j, r, row);
        json_set(j, "one_way_us", one_way_json(&row->one_way));
        set_rates(j, r, row);
        json_set_num(j, "wrong", verified ? (double)m->wrong : NAN);
        json_set_num(j, "checked_percent", verified && all > 0 ? 100 * (double)m->checked / all : NAN);
        json_set_int(j, "bytes_copied", (int64_t)m->copied);
        json_set(j, "cpu_s_per_gb", cpu_json(row));
        json_set(j, "counters", counters_json(row));
        json_set(j, "replicates", replicates_json(r, row));
        json_set(j, "replicates_ci95", interval_json(stats_median_ci95(row->replicate, row->replicates), scale));
        json_set(j, "vs_raw", versus_json(r, i));
        json_set(j, "histogram", lat ? histogram_json(&m->hist) : json_of_null());
        json_set_num(j, "histogram_relative_error", HIST_REL_ERROR);
        perf_warnings(r, row, warn_push, list);
        json_set(j, "warnings", list);
        return j;
}

/* ---- the document ---- */

static json *sizes_json(const struct perf_opts *o)
{
        json *list = json_array();

        for (size_t i = 0; i < o->n_sizes; i++) {
                json *one = json_object();

                json_set_str(one, "text", o->sizes[i].text);
                json_set_int(one, "lo", (int64_t)o->sizes[i].lo);
                json_set_int(one, "hi", (int64_t)o->sizes[i].hi);
                json_set_bool(one, "mixed", o->sizes[i].mixed);
                json_push(list, one);
        }
        return list;
}

static void set_name(json *j, const char *key, const char *text)
{
        json_set_str(j, key, text[0] ? text : NULL);
}

static void set_device(json *j, const struct perf_result *r)
{
        const struct tp_attr *a = &r->info.attr;

        json_set_str(j, "transport", r->info.transport);
        set_name(j, "peer", r->info.peer);
        set_name(j, "device", a->device);
        set_name(j, "netdev", a->netdev);
        json_set_num(j, "mtu", a->mtu ? a->mtu : NAN);
        json_set_num(j, "link_gbits_s", a->link_bits_per_s > 0 ? a->link_bits_per_s / 1e9 : NAN);
        set_name(j, "detail", a->detail);
        json_set_int(j, "driver_copies", a->driver_copies);
}

static json *config_json(const struct perf_result *r)
{
        const struct perf_opts *o = r->o;
        json *j = json_object();

        json_set_str(j, "test", perf_test_names[o->test]);
        json_set_str(j, "op", perf_op_names[o->op]);
        json_set(j, "sizes", sizes_json(o));
        json_set_int(j, "depth", o->depth);
        json_set_int(j, "connections", o->connections);
        json_set_int(j, "threads", o->threads);
        json_set_bool(j, "bidirectional", o->bidirectional);
        json_set_num(j, "duration_s", (double)o->duration_ns / 1e9);
        json_set_int(j, "iters", o->iters);
        json_set_int(j, "warmup", o->warmup > 0 ? o->warmup : 0);
        json_set_int(j, "repeats", o->repeats);
        json_set_bool(j, "verify", o->verify);
        json_set_str(j, "mem", o->mem);
        json_set_str(j, "gpu_path", tp_gpu_path_names[o->gpu_path]);
        json_set_num(j, "rate", o->rate > 0 ? o->rate : NAN);
        json_set_str(j, "arrivals", o->rate > 0 ? perf_arrival_names[o->arrivals] : NULL);
        json_set_num(j, "stall_s", (double)o->stall_ns / 1e9);
        json_set_bool(j, "raw", o->raw);
        set_device(j, r);
        return j;
}

static json *parsed_or_null(const char *text)
{
        json *j = text[0] ? json_parse(text, strlen(text), "manifest of the other end") : NULL;

        return j ? j : json_of_null();
}

json *perf_json(const struct perf_result *r)
{
        json *root = json_object(), *manifest = manifest_host(), *results = json_array(), *cores = json_array();
        const struct perf_info *i = &r->info;

        json_set_str(root, "schema", "djinnbench.perf/1");
        for (int c = 0; c < i->n_cores; c++)
                json_push(cores, json_of_int(i->cores[c]));
        json_set(manifest, "cores", cores);
        json_set_num(manifest, "numa", i->attr.device[0] && i->attr.numa >= 0 ? i->attr.numa : NAN);
        json_set(manifest, "peer", parsed_or_null(i->peer_text));
        json_set(manifest, "perf", config_json(r));
        json_set(root, "manifest", manifest);
        for (size_t n = 0; n < r->n_rows; n++)
                json_push(results, row_json(r, n));
        json_set(root, "results", results);
        json_set_bool(root, "interrupted", r->interrupted); /* fewer repeats, or fewer rows, than the options say */
        return root;
}
