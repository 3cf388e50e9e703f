/* perf: the options, worked out and checked. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "clock.h"
#include "digest.h"
#include "err.h"
#include "opts.h"
#include "perf_inside.h"

#define OPEN_LEAST 20 /* open loop: arrivals on each thread within --stall */

const char *const perf_test_names[] = {"lat", "bw", "rate", NULL};
const char *const perf_op_names[] = {"auto", "send", "write", "write_imm", "read", NULL};
const char *const perf_arrival_names[] = {"poisson", "constant", NULL};

/* ---- sizes ---- */

static int add_size(struct perf_opts *o, uint64_t lo, uint64_t hi, bool mixed, const char *text)
{
        if (o->n_sizes == PERF_SIZES_MAX)
                return err_set(-EINVAL, "--sizes: more than %d sizes", PERF_SIZES_MAX);
        if (hi > PERF_REGION_MAX)
                return err_set(-EINVAL, "--sizes: %llu bytes; the most is %llu", (unsigned long long)hi,
                               (unsigned long long)PERF_REGION_MAX);
        o->sizes[o->n_sizes] = (struct perf_size){.lo = lo, .hi = hi, .mixed = mixed};
        snprintf(o->sizes[o->n_sizes++].text, sizeof(o->sizes[0].text), "%s", text);
        return 0;
}

static int add_one(struct perf_opts *o, uint64_t size)
{
        static const char *const unit[] = {"", "K", "M", "G"};
        uint64_t v = size;
        unsigned u = 0;
        char text[32];

        while (u < 3 && v >= 1024 && v % 1024 == 0) {
                v /= 1024;
                u++;
        }
        snprintf(text, sizeof(text), "%llu%s", (unsigned long long)v, unit[u]);
        return add_size(o, size, size, false, text);
}

static int add_mixed(struct perf_opts *o, const char *first_text, const char *last_text, uint64_t first, uint64_t last)
{
        char text[40];

        if (first == 0 || last <= first)
                return err_set(-EINVAL, "--sizes: %s..%s:log does not lead from a size of at least 1 to a larger one",
                               first_text, last_text);
        snprintf(text, sizeof(text), "%.12s..%.12s:log", first_text, last_text);
        return add_size(o, first, last, true, text);
}

/* "1..4M:x2", "64..512:+64": a row per step, the end when a step hits it. "1..64K:log": one row of mixed sizes. */
static int add_range(struct perf_opts *o, char *text, char *dots)
{
        char *colon = strchr(dots, ':');
        uint64_t first, last, step = 2;
        bool log = colon && !strcmp(colon, ":log");
        int rc;

        *dots = '\0';
        if (!colon || (!log && colon[1] != 'x' && colon[1] != '+'))
                return err_set(-EINVAL,
                               "--sizes: a range needs its step: %s..LAST:x2, or :+64, or :log for mixed sizes", text);
        *colon = '\0';
        if ((rc = opts_size(text, "--sizes", &first)) < 0 || (rc = opts_size(dots + 2, "--sizes", &last)) < 0 ||
            (!log && (rc = opts_size(colon + 2, "--sizes", &step)) < 0))
                return rc;
        if (log)
                return add_mixed(o, text, dots + 2, first, last);
        if (last < first || step < (colon[1] == 'x' ? 2 : 1) || (colon[1] == 'x' && first == 0) ||
            last > PERF_REGION_MAX || step > PERF_REGION_MAX)
                return err_set(-EINVAL, "--sizes: %s..%s:%s does not lead from a smaller size to a larger one", text,
                               dots + 2, colon + 1);
        for (uint64_t s = first; s <= last; s = colon[1] == 'x' ? s * step : s + step)
                if ((rc = add_one(o, s)) < 0)
                        return rc;
        return 0;
}

static int parse_sizes(struct perf_opts *o)
{
        char *copy = strdup(o->sizes_text), *save = NULL;
        int rc = copy ? 0 : err_set(-ENOMEM, "no memory");

        for (char *t = copy ? strtok_r(copy, ",", &save) : NULL; t && !rc; t = strtok_r(NULL, ",", &save)) {
                char *dots = strstr(t, "..");
                uint64_t size;

                if (dots)
                        rc = add_range(o, t, dots);
                else if ((rc = opts_size(t, "--sizes", &size)) == 0)
                        rc = add_one(o, size);
        }
        free(copy);
        if (!rc && !o->n_sizes)
                rc = err_set(-EINVAL, "--sizes: no size in '%s'", o->sizes_text);
        return rc;
}

static int check_sizes(const struct perf_opts *o)
{
        for (size_t i = 0; i < o->n_sizes; i++) {
                const struct perf_size *size = &o->sizes[i];

                if (size->lo == 0 && o->test != PERF_LAT)
                        return err_set(-EINVAL,
                                       "--sizes: 0 bytes have no bandwidth, and a rate of them is no use to anybody; "
                                       "messages of 0 bytes are for lat");
                if (perf_slots_bytes(o, size) * (uint64_t)o->connections > PERF_REGION_MAX)
                        return err_set(
                            -EINVAL, "--sizes: %s on %lld connections: more memory than the %llu MB that an end opens",
                            size->text, (long long)o->connections, (unsigned long long)(PERF_REGION_MAX >> 20));
        }
        if (o->forever && o->n_sizes > 1)
                return err_set(-EINVAL, "--forever measures one size; --sizes names %zu", o->n_sizes);
        return 0;
}

/* ---- cores ---- */

static int add_core(struct perf_opts *o, long core)
{
        long there_are = sysconf(_SC_NPROCESSORS_CONF);

        if (core < 0 || (there_are > 0 && core >= there_are))
                return err_set(-EINVAL, "--cpus %s: there is no core %ld; this host has 0 to %ld", o->cpus, core,
                               there_are - 1);
        if (core >= CPU_SETSIZE || !CPU_ISSET((unsigned)core, perf_allowed()))
                return err_set(-EINVAL, "--cpus %s: core %ld is not one that this process may use", o->cpus, core);
        if (o->n_cores == PERF_CORES_MAX)
                return err_set(-EINVAL, "--cpus: more than %d cores", PERF_CORES_MAX);
        o->cores[o->n_cores++] = (int)core;
        return 0;
}

static int parse_cpus(struct perf_opts *o)
{
        bool here = !o->listen && !o->connect;
        const char *p = o->cpus;
        int rc = 0;

        if (!p)
                return 0;
        while (*p && !rc) {
                long first, last;
                int used = 0;

                if (sscanf(p, "%ld%n", &first, &used) != 1)
                        return err_set(-EINVAL, "--cpus %s: expected a list of cores, as 0,1 or 0-3", o->cpus);
                p += used;
                last = first;
                if (*p == '-' && sscanf(p + 1, "%ld%n", &last, &used) == 1)
                        p += 1 + used;
                for (long i = first; i <= last && !rc; i++)
                        rc = add_core(o, i);
                p += *p == ',' || *p == ' ';
        }
        if (!rc && (o->n_cores == 0 || (here && o->n_cores % 2)))
                return err_set(-EINVAL,
                               "--cpus '%s': expected an even number of cores, those of this end and then those of the "
                               "other one, as 0,1",
                               o->cpus);
        return rc;
}

/* ---- transport ---- */

static int find_word(const char *const *words, const char *word)
{
        for (int i = 0; words[i]; i++)
                if (!strcmp(words[i], word))
                        return i;
        return -1;
}

/* "fault+tcp?eagain=5" is carried by tcp. */
static void carrier_of(const char *text, char out[32])
{
        const char *plus;

        snprintf(out, 32, "%.*s", (int)strcspn(text, ":?"), text);
        plus = strrchr(out, '+');
        if (plus)
                memmove(out, plus + 1, strlen(plus + 1) + 1);
}

static const struct tp_backend *backend_of(const char *name)
{
        for (const struct tp_backend *b = tp_backends; b->scheme; b++)
                if (!strcmp(b->scheme, name))
                        return b;
        return NULL;
}

static int check_named(const struct perf_opts *o, const char *named, const char *carrier)
{
        const struct tp_backend *b = backend_of(carrier);

        if (!strcmp(carrier, "null"))
                return err_set(-EINVAL,
                               "%s: null takes everything and delivers nothing, so there is no other end to "
                               "measure against; loop is the transport without a medium",
                               named);
        if (o->listen || o->connect) {
                if (!strcmp(carrier, "loop"))
                        return err_set(-EINVAL, "%s: loop does not leave its process; use --transport loop", named);
                return 0;
        }
        if (!b)
                return err_set(-EINVAL, "--transport %s: there is none of this name; see `djinnbench list`", named);
        if (tp_unavailable(b))
                return err_set(-ENOTSUP, "--transport %s: %s", named, tp_unavailable(b));
        return 0;
}

static int pick_transport(struct perf_opts *o)
{
        const char *named = o->listen ? o->listen : o->connect ? o->connect : o->transport;
        char carrier[32];

        if (named) {
                carrier_of(named, carrier);
                return check_named(o, named, carrier);
        }
        for (const struct tp_backend *b = tp_backends; b->scheme; b++) {
                if (tp_unavailable(b))
                        continue;
                o->transport = b->scheme;
                return 0;
        }
        return err_set(-ENOTSUP, "no transport is available; see `djinnbench list`");
}

static int check_mem(const struct perf_opts *o)
{
        char *end;

        if (!strcmp(o->mem, "host")) {
                if (o->gpu_path != TP_GPU_AUTO)
                        return err_set(-EINVAL,
                                       "--gpu-path %s says how memory of a device is reached; --mem is host memory",
                                       tp_gpu_path_names[o->gpu_path]);
                return 0;
        }
        if (!strncmp(o->mem, "cuda:", 5) && o->mem[5] >= '0' && o->mem[5] <= '9') {
                strtoul(o->mem + 5, &end, 10);
                if (!*end)
                        return err_set(-ENOTSUP,
                                       "--mem %s: memory of a CUDA device is not part of this build: it has no CUDA "
                                       "device (see `djinnbench list`); --mem host measures host memory",
                                       o->mem);
        }
        return err_set(-EINVAL, "--mem %s: expected host or cuda:N", o->mem);
}

static int check_raw(const struct perf_opts *o)
{
        const char *url = o->connect ? o->connect : o->transport, *why;

        if (!o->raw || o->listen)
                return 0;
        if (o->connections > 1 || o->bidirectional || o->rate > 0 || o->forever)
                return err_set(-EINVAL, "--raw measures one connection, one way, in a closed loop: without "
                                        "--connections, --bidirectional, --rate and --forever");
        for (size_t i = 0; i < o->n_sizes; i++)
                if (o->sizes[i].mixed)
                        return err_set(-EINVAL, "--raw measures messages of one size, not %s", o->sizes[i].text);
        why = raw_unavailable(url);
        if (why)
                return err_set(-EINVAL, "--raw: the bare medium below %s cannot be measured: %s", url, why);
        return 0;
}

/* ---- the rest ---- */

const char *const perf_config_names[PF_CONFIG] = {
    [PF_TEST] = "test",
    [PF_OP] = "--op",
    [PF_SIZES] = "--sizes",
    [PF_DEPTH] = "--depth",
    [PF_DURATION] = "--duration",
    [PF_ITERS] = "--iters",
    [PF_REPEATS] = "--repeats",
    [PF_VERIFY] = "--verify",
    [PF_BIDIR] = "--bidirectional",
    [PF_CONNECTIONS] = "--connections",
    [PF_THREADS] = "--threads",
    [PF_RATE] = "--rate",
    [PF_ARRIVALS] = "--arrivals",
    [PF_RAW] = "--raw",
};

const char *perf_config_text(int field, uint64_t value, char *buf, size_t len)
{
        double rate;

        if (field == PF_TEST && value < PERF_TESTS)
                return perf_test_names[value];
        if (field == PF_OP && value < PERF_OPS)
                return perf_op_names[value];
        if (field == PF_ARRIVALS && value <= PERF_CONSTANT)
                return perf_arrival_names[value];
        if (field == PF_VERIFY || field == PF_BIDIR || field == PF_RAW)
                return value ? "it" : "it not";
        memcpy(&rate, &value, sizeof(rate));
        if (field == PF_DURATION)
                snprintf(buf, len, "%g s", (double)value / 1e9);
        else if (field == PF_RATE)
                snprintf(buf, len, "%g per second", rate);
        else
                snprintf(buf, len, "%llu", (unsigned long long)value);
        return buf;
}

static void gather_config(struct perf_opts *o, const struct opts_parsed *p)
{
        uint64_t sizes[3 * PERF_SIZES_MAX];

        for (size_t i = 0; i < o->n_sizes; i++) {
                sizes[3 * i] = o->sizes[i].lo;
                sizes[3 * i + 1] = o->sizes[i].hi;
                sizes[3 * i + 2] = o->sizes[i].mixed;
        }
        o->config[PF_TEST] = (uint64_t)o->test;
        o->config[PF_OP] = (uint64_t)o->op;
        o->config[PF_SIZES] = digest_of(sizes, 3 * o->n_sizes * sizeof(sizes[0])).lo;
        o->config[PF_DEPTH] = (uint64_t)o->depth;
        o->config[PF_DURATION] = o->duration_ns;
        o->config[PF_ITERS] = (uint64_t)o->iters;
        o->config[PF_REPEATS] = (uint64_t)o->repeats;
        o->config[PF_VERIFY] = o->verify;
        o->config[PF_CONNECTIONS] = (uint64_t)o->connections;
        o->config[PF_THREADS] = (uint64_t)o->threads;
        o->config[PF_BIDIR] = o->bidirectional;
        memcpy(&o->config[PF_RATE], &o->rate, sizeof(o->rate));
        o->config[PF_ARRIVALS] = (uint64_t)o->arrivals;
        o->config[PF_RAW] = o->raw;
        o->config_given = p->nargs ? 1u << PF_TEST : 0;
        for (int i = 0; i < PF_CONFIG; i++)
                if (perf_config_names[i][0] == '-' && opts_given(&perf_spec, p, perf_config_names[i] + 2))
                        o->config_given |= 1u << i;
}

/* Off this host, and over what leaves it by nature, both ends need the same key, unless the user says that they do not.
 */
static int need_key(struct perf_opts *o)
{
        const char *url = o->listen ? o->listen : o->connect, *file = o->key_file;
        struct tp_url u;
        char carrier[32];
        int rc;

        file = file ? file : getenv("DJINN_KEY_FILE");
        if (file && (rc = key_load(file, &o->key)) < 0)
                return rc;
        if (!url || o->key.present || o->insecure)
                return 0;
        carrier_of(url, carrier);
        rc = tp_url_parse(url, &u);
        if (rc < 0)
                return rc;
        if (!strcmp(carrier, "rdma") || !strcmp(carrier, "dpdk"))
                return err_set(-EINVAL, "%s: over %s both ends need the same --key-file always (or --insecure)", url,
                               carrier);
        if (u.loopback)
                return 0;
        return err_set(-EINVAL, "%s %s: both ends need the same --key-file (or --insecure)", url,
                       o->listen ? "can be reached from other hosts" : "is not on this host");
}

/* What cannot be written is known before anything is measured. Results are written beside the file and renamed, so it is
 * the folder that must be writable. */
static int probe_json(const char *path)
{
        struct stat st;
        char *temp;
        int fd, rc = 0;

        if (!path[0] || (stat(path, &st) == 0 && !S_ISREG(st.st_mode)))
                return err_set(-EINVAL, "--json %s: not the name of a file", path);
        if (asprintf(&temp, "%s.XXXXXX", path) < 0)
                return err_set(-ENOMEM, "no memory");
        fd = mkstemp(temp);
        if (fd < 0)
                rc = err_set(-EINVAL, "--json %s: cannot be written: %s", path, strerror(errno));
        else {
                unlink(temp);
                close(fd);
        }
        free(temp);
        return rc;
}

static int check_shape(const struct perf_opts *o, const struct opts_parsed *p)
{
        double least = OPEN_LEAST * (double)o->threads / ((double)o->stall_ns / 1e9);

        if (o->listen && o->connect)
                return err_set(-EINVAL, "--listen and --connect exclude each other");
        if (o->once && !o->listen)
                return err_set(-EINVAL, "--once is for --listen");
        if (o->transport && (o->listen || o->connect))
                return err_set(-EINVAL, "--transport says what the URL of --listen or --connect says already");
        if (o->iters && (o->forever || opts_given(&perf_spec, p, "duration")))
                return err_set(-EINVAL, "--iters, --duration and --forever exclude one another");
        if (o->forever && opts_given(&perf_spec, p, "duration"))
                return err_set(-EINVAL, "--iters, --duration and --forever exclude one another");
        if (o->threads > o->connections)
                return err_set(-EINVAL, "--threads %lld: there are only %lld connections to share among them",
                               (long long)o->threads, (long long)o->connections);
        if (o->bidirectional && o->test == PERF_LAT)
                return err_set(-EINVAL, "--bidirectional is for bw and rate; lat goes both ways anyway");
        if (o->rate > 0 && o->test != PERF_LAT)
                return err_set(-EINVAL, "--rate is for lat: it asks how long answers take at that rate");
        if (o->rate == 0 && opts_given(&perf_spec, p, "arrivals"))
                return err_set(-EINVAL, "--arrivals says how those of --rate come, and there is no --rate");
        if (o->rate > 0 && o->rate < least)
                return err_set(-EINVAL,
                               "--rate %g: at least %g per second, or the peer takes the silence for an end "
                               "(--stall)",
                               o->rate, ceil(least));
        return 0;
}

int perf_opts_refine(struct perf_opts *o, const struct opts_parsed *p)
{
        int rc;

        o->test = p->nargs ? find_word(perf_test_names, p->args[0]) : PERF_LAT;
        if (o->test < 0)
                return err_set(-EINVAL, "'%s' is no test; there are lat, bw and rate", p->args[0]);
        if (o->forever)
                o->repeats = 1;
        if ((rc = check_shape(o, p)) < 0 || (rc = parse_sizes(o)) < 0 || (rc = check_sizes(o)) < 0 ||
            (rc = parse_cpus(o)) < 0 || (rc = check_mem(o)) < 0 || (rc = pick_transport(o)) < 0 ||
            (rc = check_raw(o)) < 0 || (rc = need_key(o)) < 0 || (o->json && (rc = probe_json(o->json)) < 0))
                return rc;
        gather_config(o, p);
        return 0;
}
