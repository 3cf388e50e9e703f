/*
 * perf: the transports alone. Options, the plan, and both ends: the driver here, the peer in a process of its own (a
 * thread for loop, which has no other way), on another machine (--connect), or this program itself (--listen).
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "digest.h"
#include "err.h"
#include "log.h"
#include "perf_inside.h"
#include "raw.h"
#include "tools.h"

#define START_NS (10 * NS_PER_S)
#define END_NS   (2 * NS_PER_S) /* how long the other end may take to end by itself */

static const struct opt perf_options[] = {
    {"transport", .metavar = "T", .type = OPT_STR, .offset = offsetof(struct perf_opts, transport),
     .help = "shm, tcp, loop, ...; default: the best that is available here"},
    {"op", .type = OPT_CHOICE, .offset = offsetof(struct perf_opts, op), .choices = perf_op_names, .preset = "auto",
     .help = "operation; auto: send where a message can be so long, else write"},
    {"sizes", .metavar = "LIST", .type = OPT_STR, .offset = offsetof(struct perf_opts, sizes_text),
     .preset = "64,4K,1M", .help = "bytes: 64,4K,1M or ranges 1..4M:x2, 64..512:+64"},
    {"duration", .metavar = "TIME", .type = OPT_DURATION, .offset = offsetof(struct perf_opts, duration_ns), .min = 1e6,
     .max = 3.6e12, .preset = "500ms", .help = "time of one repeat of one size"},
    {"iters", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, iters), .min = 1, .max = 1e9,
     .help = "transfers in a repeat, instead of a duration"},
    {"warmup", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, warmup), .max = 1e9,
     .help = "transfers before each repeat; default: a tenth of the duration, none with --iters"},
    {"repeats", .metavar = "K", .type = OPT_INT, .offset = offsetof(struct perf_opts, repeats), .min = 1,
     .max = PERF_REPEATS_MAX, .preset = "3", .help = "repeats of each size"},
    {"depth", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, depth), .min = 1,
     .max = PERF_DEPTH_MAX, .preset = "16", .help = "bw, rate: transfers in flight"},
    {"raw", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, raw),
     .help = "measure the bare medium beside it, in the same run (shm, tcp)"},
    {"verify", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, verify),
     .help = "fill and check every byte, at both ends; costs time"},
    {"cpus", .metavar = "LIST", .type = OPT_STR, .offset = offsetof(struct perf_opts, cpus),
     .help = "cores of this end and of the other one, as 0,1; default: two of those allowed"},
    {"json", .metavar = "FILE", .type = OPT_STR, .offset = offsetof(struct perf_opts, json),
     .help = "write the results there (djinnbench.perf/1)"},
    {"listen", .metavar = "URL", .type = OPT_STR, .offset = offsetof(struct perf_opts, listen),
     .help = "be the other end; options given here must agree with the driver's"},
    {"once", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, once),
     .help = "with --listen: end after the first driver"},
    {"connect", .metavar = "URL", .type = OPT_STR, .offset = offsetof(struct perf_opts, connect),
     .help = "measure against a perf --listen elsewhere"},
    {"wait", .metavar = "S", .type = OPT_INT, .offset = offsetof(struct perf_opts, wait_s), .max = 86400,
     .help = "with --connect: try for S seconds until somebody listens"},
    {"key-file", .metavar = "FILE", .type = OPT_STR, .offset = offsetof(struct perf_opts, key_file),
     .help = "key that both ends hold; needed off this host (or DJINN_KEY_FILE)"},
    {"insecure", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, insecure),
     .help = "go without a key off this host"},
};

const struct opts_spec perf_spec = {
    .name = "djinnbench perf",
    .usage = "[lat|bw|rate] [--transport T] [options]",
    .about = "Measures a transport alone: lat, half of a round trip; bw, bandwidth confirmed by the receiver; rate, "
             "messages per second. Starts both ends here, on cores of their own, unless told to listen or to "
             "connect.",
    .table = perf_options,
    .count = sizeof(perf_options) / sizeof(perf_options[0]),
    .args_max = 1,
    .args_what = "one of lat, bw, rate",
};

/* ---- options ---- */

static int add_size(struct perf_opts *o, uint64_t size)
{
        if (o->n_sizes == PERF_SIZES_MAX)
                return err_set(-EINVAL, "--sizes: more than %d sizes", PERF_SIZES_MAX);
        if (size > PERF_REGION_MAX)
                return err_set(-EINVAL, "--sizes: %llu bytes; the most is %llu", (unsigned long long)size,
                               (unsigned long long)PERF_REGION_MAX);
        o->sizes[o->n_sizes++] = size;
        return 0;
}

/* "1..4M:x2" or "64..512:+64": the end belongs to it when a step hits it. */
static int add_range(struct perf_opts *o, char *text, char *dots)
{
        char *colon = strchr(dots, ':');
        uint64_t first, last, step;
        int rc;

        *dots = '\0';
        if (!colon || (colon[1] != 'x' && colon[1] != '+'))
                return err_set(-EINVAL, "--sizes: a range needs its step: %s%s:x2", text, "..LAST");
        *colon = '\0';
        if ((rc = opts_size(text, "--sizes", &first)) < 0 || (rc = opts_size(dots + 2, "--sizes", &last)) < 0 ||
            (rc = opts_size(colon + 2, "--sizes", &step)) < 0)
                return rc;
        if (last < first || step < (colon[1] == 'x' ? 2 : 1) || (colon[1] == 'x' && first == 0) ||
            last > PERF_REGION_MAX || step > PERF_REGION_MAX)
                return err_set(-EINVAL, "--sizes: %s..%s:%s does not lead from a smaller size to a larger one", text,
                               dots + 2, colon + 1);
        for (uint64_t s = first; s <= last; s = colon[1] == 'x' ? s * step : s + step)
                if ((rc = add_size(o, s)) < 0)
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
                        rc = add_size(o, size);
        }
        free(copy);
        if (!rc && !o->n_sizes)
                rc = err_set(-EINVAL, "--sizes: no size in '%s'", o->sizes_text);
        return rc;
}

static int parse_cpus(struct perf_opts *o, const cpu_set_t *allowed)
{
        long cpu[2], there_are = sysconf(_SC_NPROCESSORS_CONF);
        int used = 0;

        if (sscanf(o->cpus, "%ld%*[, -]%ld%n", &cpu[0], &cpu[1], &used) != 2 || o->cpus[used])
                return err_set(-EINVAL, "--cpus %s: expected two cores, as 0,1", o->cpus);
        for (int i = 0; i < 2; i++) {
                if (cpu[i] < 0 || (there_are > 0 && cpu[i] >= there_are))
                        return err_set(-EINVAL, "--cpus %s: there is no core %ld; this host has 0 to %ld", o->cpus,
                                       cpu[i], there_are - 1);
                if (cpu[i] >= CPU_SETSIZE || !CPU_ISSET((unsigned)cpu[i], allowed))
                        return err_set(-EINVAL, "--cpus %s: core %ld is not one that this process may use", o->cpus,
                                       cpu[i]);
        }
        o->cpu_driver = (int)cpu[0];
        o->cpu_peer = (int)cpu[1];
        return 0;
}

/* The last two of the cores that we may use: the first ones get most of a host's interrupts. */
static int choose_cpus(struct perf_opts *o)
{
        cpu_set_t allowed;
        int found = 0;

        o->cpu_driver = o->cpu_peer = -1;
        if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0)
                return 0;
        if (o->cpus) {
                int rc = parse_cpus(o, &allowed);

                o->one_core = rc == 0 && o->cpu_driver == o->cpu_peer && !o->connect;
                return rc;
        }
        o->one_core = CPU_COUNT(&allowed) < 2 && !o->connect;
        if (o->one_core)
                return 0;
        for (int i = CPU_SETSIZE - 1; i >= 0 && found < 2; i--)
                if (CPU_ISSET((unsigned)i, &allowed))
                        *(found++ ? &o->cpu_driver : &o->cpu_peer) = i;
        return 0;
}

static int find_word(const char *const *words, const char *word)
{
        for (int i = 0; words[i]; i++)
                if (!strcmp(words[i], word))
                        return i;
        return -1;
}

/* The backend of a name; of a wrapped one, "fault+tcp", what it is wrapped around. */
static const struct tp_backend *backend_of(const char *name)
{
        const char *plus = strrchr(name, '+');

        for (const struct tp_backend *b = tp_backends; b->scheme; b++)
                if (!strcmp(b->scheme, plus ? plus + 1 : name))
                        return b;
        return NULL;
}

/* null, or null in a wrapping: of a name or of a URL. */
static bool is_null(const char *text)
{
        char scheme[32];
        const char *plus;

        snprintf(scheme, sizeof(scheme), "%.*s", (int)strcspn(text, ":"), text);
        plus = strrchr(scheme, '+');
        return !strcmp(plus ? plus + 1 : scheme, "null");
}

static int pick_transport(struct perf_opts *o)
{
        const char *named = o->listen ? o->listen : o->connect ? o->connect : o->transport;
        const struct tp_backend *b;

        if (named && is_null(named))
                return err_set(-EINVAL,
                               "%s: null takes everything and delivers nothing, so there is no other end to "
                               "measure against; loop is the transport without a medium",
                               named);
        if (o->listen || o->connect)
                return 0;
        if (o->transport) {
                b = backend_of(o->transport);
                if (!b)
                        return err_set(-EINVAL, "--transport %s: there is none of this name; see `djinnbench list`",
                                       o->transport);
                if (tp_unavailable(b))
                        return err_set(-ENOTSUP, "--transport %s: %s", o->transport, tp_unavailable(b));
                return 0;
        }
        for (b = tp_backends; b->scheme; b++) {
                if (tp_unavailable(b))
                        continue;
                o->transport = b->scheme;
                return 0;
        }
        return err_set(-ENOTSUP, "no transport is available; see `djinnbench list`");
}

static void gather_config(struct perf_opts *o, const struct opts_parsed *p)
{
        static const char *const options[PF_CONFIG] = {
            [PF_OP] = "op",       [PF_SIZES] = "sizes",     [PF_DEPTH] = "depth",  [PF_DURATION] = "duration",
            [PF_ITERS] = "iters", [PF_REPEATS] = "repeats", [PF_VERIFY] = "verify"};

        o->config[PF_TEST] = (uint64_t)o->test;
        o->config[PF_OP] = (uint64_t)o->op;
        o->config[PF_SIZES] = digest_of(o->sizes, o->n_sizes * sizeof(o->sizes[0])).lo;
        o->config[PF_DEPTH] = (uint64_t)o->depth;
        o->config[PF_DURATION] = o->duration_ns;
        o->config[PF_ITERS] = (uint64_t)o->iters;
        o->config[PF_REPEATS] = (uint64_t)o->repeats;
        o->config[PF_VERIFY] = o->verify;
        o->config_given = p->nargs ? 1u << PF_TEST : 0;
        for (int i = 0; i < PF_CONFIG; i++)
                if (options[i] && opts_given(&perf_spec, p, options[i]))
                        o->config_given |= 1u << i;
}

/* Off this host both ends need the same key, unless the user says that they do not. */
static int need_key(struct perf_opts *o)
{
        const char *url = o->listen ? o->listen : o->connect, *file = o->key_file;
        struct tp_url u;
        int rc;

        file = file ? file : getenv("DJINN_KEY_FILE");
        if (file && (rc = key_load(file, &o->key)) < 0)
                return rc;
        if (!url || o->key.present || o->insecure)
                return 0;
        rc = tp_url_parse(url, &u);
        if (rc < 0 || u.loopback)
                return rc;
        return err_set(-EINVAL, "%s is not on this host: both ends need the same --key-file (or --insecure)", url);
}

static int check_sizes(const struct perf_opts *o)
{
        for (size_t i = 0; i < o->n_sizes; i++)
                if (o->sizes[i] == 0 && o->test != PERF_LAT)
                        return err_set(-EINVAL,
                                       "--sizes: 0 bytes have no bandwidth, and a rate of them is no use to anybody; "
                                       "messages of 0 bytes are for lat");
        return 0;
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

static int refine(struct perf_opts *o, const struct opts_parsed *p)
{
        int rc;

        o->test = p->nargs ? find_word(perf_test_names, p->args[0]) : PERF_LAT;
        if (o->test < 0)
                return err_set(-EINVAL, "'%s' is no test; there are lat, bw and rate", p->args[0]);
        if (o->listen && o->connect)
                return err_set(-EINVAL, "--listen and --connect exclude each other");
        if (o->transport && (o->listen || o->connect))
                return err_set(-EINVAL, "--transport says what the URL of --listen or --connect says already");
        if (o->raw && (o->listen || o->connect))
                return err_set(-EINVAL, "--raw measures this host only, without --listen and --connect");
        if ((rc = parse_sizes(o)) < 0 || (rc = check_sizes(o)) < 0 || (rc = choose_cpus(o)) < 0 ||
            (rc = pick_transport(o)) < 0 || (rc = need_key(o)) < 0 || (o->json && (rc = probe_json(o->json)) < 0))
                return rc;
        if (perf_region_bytes(o) > PERF_REGION_MAX)
                return err_set(-EINVAL, "--sizes: too large");
        if (o->raw && strcmp(o->transport, "shm") && strcmp(o->transport, "tcp"))
                return err_set(-EINVAL, "--raw: there is no bare medium below %s, only below shm and tcp",
                               o->transport);
        gather_config(o, p);
        return 0;
}

/* ---- signals ---- */

volatile sig_atomic_t perf_stopped;
static volatile sig_atomic_t helper_pid; /* the other end, if it is a process of ours: it is told first */

static void on_signal(int sig)
{
        (void)sig;
        perf_stopped = 1;
        if (helper_pid > 0)
                kill((pid_t)helper_pid, SIGTERM);
}

/* Whoever cannot wait for an orderly end sends a second one. */
static void catch_signals(int flags)
{
        struct sigaction sa = {.sa_handler = on_signal, .sa_flags = SA_RESTART | flags};

        sigaction(SIGINT, &sa, NULL);
        sigaction(SIGTERM, &sa, NULL);
}

/* ---- the peer ---- */

static void pin(int cpu)
{
        cpu_set_t set;

        if (cpu < 0)
                return;
        CPU_ZERO(&set);
        CPU_SET((unsigned)cpu, &set);
        pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

/* Serves one driver. */
static int serve_driver(struct tp_ctx *ctx, struct tp_listener *tl, const struct perf_opts *o)
{
        struct perf_link l = {.ctx = ctx};
        int rc = perf_accept(&l, o, tl);

        if (rc == 0)
                rc = perf_serve_cases(&l);
        perf_unlink(&l);
        return rc;
}

/* Where the peer that we start ourselves says what its address is, or that it failed. */
struct start {
        const struct perf_opts *o;
        const char *listen;
        int fd;
};

static int peer_run(const struct start *s)
{
        struct tp_listener *tl;
        struct tp_ctx *ctx;
        int rc = tp_open(s->listen, NULL, &ctx);

        if (rc < 0)
                return rc;
        rc = tp_listen(ctx, s->listen, &tl);
        if (rc == 0) {
                rc = write(s->fd, tl->url, strlen(tl->url) + 1) < 0 ? -errno : 0;
                rc = rc ? rc : serve_driver(ctx, tl, s->o);
        }
        tp_close(ctx);
        return rc;
}

static void *peer_thread(void *arg)
{
        struct start *s = arg;
        int rc;

        pin(s->o->cpu_peer);
        rc = peer_run(s);
        if (rc < 0 && !perf_stopped)
                log_error("perf, the other end: %s", err_str(rc));
        close(s->fd);
        return NULL;
}

static _Noreturn void peer_process(struct start *s, pid_t parent)
{
        int rc;

        catch_signals(0);
        prctl(PR_SET_PDEATHSIG, SIGTERM); /* and so it takes its socket along, however the driver ends */
        if (getppid() != parent)
                _exit(EXIT_ENVIRONMENT);
        pin(s->o->cpu_peer);
        rc = peer_run(s);
        if (rc < 0 && !perf_stopped)
                log_error("perf, the other end: %s", err_str(rc));
        _exit(rc < 0 ? EXIT_ENVIRONMENT : EXIT_DONE);
}

struct helper { /* the other end, when it is ours */
        struct start start;
        pthread_t thread;
        pid_t pid;
        bool is_thread, running;
        int fd;
        char listen[TP_URL_MAX], url[TP_URL_MAX];
};

static int helper_url(struct helper *h)
{
        struct pollfd p = {.fd = h->fd, .events = POLLIN};
        ssize_t n;

        if (poll(&p, 1, (int)(START_NS / NS_PER_MS)) != 1)
                return perf_stopped ? err_set(-EINTR, "ended by a signal")
                                    : err_set(-ETIMEDOUT, "the other end did not start within %u s",
                                              (unsigned)(START_NS / NS_PER_S));
        n = read(h->fd, h->url, sizeof(h->url));
        if (n <= 0 || h->url[n - 1])
                return err_set(-ECHILD, "the other end could not listen on %s", h->listen);
        return 0;
}

static int helper_start(struct helper *h, const struct perf_opts *o)
{
        pid_t parent = getpid();
        int pipe_fd[2], rc;

        h->is_thread = strstr(o->transport, "loop") != NULL || strstr(o->transport, "null") != NULL;
        if (strstr(o->transport, "tcp"))
                snprintf(h->listen, sizeof(h->listen), "%s://127.0.0.1:0", o->transport);
        else
                snprintf(h->listen, sizeof(h->listen), "%s://djinnbench-perf-%d", o->transport, (int)parent);
        if (pipe2(pipe_fd, O_CLOEXEC) < 0)
                return err_set(-errno, "cannot make a pipe: %s", strerror(errno));
        h->fd = pipe_fd[0];
        h->start = (struct start){.o = o, .listen = h->listen, .fd = pipe_fd[1]};
        if (h->is_thread) {
                rc = -pthread_create(&h->thread, NULL, peer_thread, &h->start);
        } else {
                h->pid = fork();
                rc = h->pid < 0 ? -errno : 0;
                if (h->pid == 0)
                        peer_process(&h->start, parent);
                helper_pid = h->pid > 0 ? h->pid : 0;
                close(pipe_fd[1]);
        }
        if (rc < 0)
                return err_set(rc, "cannot start the other end: %s", strerror(-rc));
        h->running = true;
        return helper_url(h);
}

/* In good time, or by force. */
static void helper_reap(pid_t pid)
{
        uint64_t until = clock_ns() + END_NS;

        while (waitpid(pid, NULL, WNOHANG) == 0) {
                if (clock_ns() > until)
                        kill(pid, SIGKILL);
                clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = 2 * NS_PER_MS}, NULL);
        }
}

/* All is said and done, or the connection is down: it ends by itself, or is made to. */
static void helper_end(struct helper *h, bool well)
{
        if (!h->running)
                return;
        if (h->is_thread) {
                if (well || perf_stopped)
                        pthread_join(h->thread, NULL);
                else
                        pthread_detach(h->thread); /* the process is about to end with an error */
        } else {
                helper_pid = 0;
                if (!well || perf_stopped)
                        kill(h->pid, SIGTERM);
                helper_reap(h->pid);
        }
        close(h->fd);
}

static int listen_for_ever(const struct perf_opts *o)
{
        struct tp_listener *tl;
        struct tp_ctx *ctx;
        int rc = tp_open(o->listen, NULL, &ctx);

        if (rc < 0)
                return rc;
        pin(o->cpus ? o->cpu_driver : -1);
        rc = tp_listen(ctx, o->listen, &tl);
        if (rc == 0)
                log_info("perf: listening on %s", tl->url);
        while (rc == 0) {
                rc = serve_driver(ctx, tl, o);
                if (o->once)
                        break;
                if (perf_stopped) { /* how it is meant to end */
                        rc = 0;
                        break;
                }
                if (rc < 0)
                        log_warn("perf: %s", err_str(rc));
                rc = 0;
        }
        tp_close(ctx);
        return rc;
}

/* ---- the driver ---- */

static int row_add(struct perf_result *r, uint64_t size, bool raw)
{
        struct perf_row *row = calloc(1, sizeof(*row));

        if (!row)
                return err_set(-ENOMEM, "no memory for results");
        row->test = (enum perf_test)r->o->test;
        row->size = size;
        row->raw = raw;
        row->op = perf_op_for(r->o, &r->attr, size);
        row->window = row->test == PERF_LAT ? 1 : (unsigned)r->o->depth;
        hist_reset(&row->hist);
        r->rows[r->n_rows++] = row;
        return 0;
}

static int plan_rows(struct perf_result *r, size_t msg_max)
{
        const struct perf_opts *o = r->o;
        int rc;

        r->rows = calloc(2 * o->n_sizes, sizeof(*r->rows));
        if (!r->rows)
                return err_set(-ENOMEM, "no memory for results");
        for (size_t i = 0; i < o->n_sizes; i++) {
                if (o->op == PERF_SEND && o->sizes[i] > msg_max)
                        return err_set(-EINVAL, "--op send: a message over %s has at most %zu bytes, not %llu",
                                       r->transport, msg_max, (unsigned long long)o->sizes[i]);
                if ((rc = row_add(r, o->sizes[i], false)) < 0 || (o->raw && (rc = row_add(r, o->sizes[i], true)) < 0))
                        return rc;
        }
        return 0;
}

static bool is_environment(int rc)
{
        return rc != -EINVAL && rc != -EPERM;
}

/* A raw pair polls without end, so it lives only while it is being measured. */
static int run_raw(const struct perf_opts *o, const struct perf_link *l, struct perf_row *row)
{
        struct raw_pair *raw;
        int rc = raw_open(o->transport, row->size, o->cpu_peer, &raw);

        if (rc < 0)
                return rc;
        rc = perf_run_raw(raw, o, l->tx, row);
        raw_close(raw);
        return rc;
}

static int run_rows(struct perf_link *l, struct perf_result *r)
{
        const struct perf_opts *o = r->o;
        size_t per_size = o->raw ? 2 : 1;
        int rc = 0;

        perf_print_head(r);
        for (size_t i = 0; i < r->n_rows && !rc; i += per_size) {
                for (int64_t k = 0; k < o->repeats && !rc; k++) {
                        rc = perf_run_case(l, o, r->rows[i], clock_ns() * 2 + 1);
                        if (!rc && o->raw)
                                rc = run_raw(o, l, r->rows[i + 1]);
                }
                for (size_t j = 0; j < per_size; j++)
                        if (!rc || (perf_stopped && r->rows[i + j]->replicates))
                                perf_print_row(r, r->rows[i + j]);
        }
        return rc;
}

static void goodbye(struct perf_link *l)
{
        struct perf_ctl bye = {.kind = PERF_BYE};

        perf_tell(l, &bye);
}

/* An early end leaves rows of which no repeat was finished. */
static void drop_empty_rows(struct perf_result *r)
{
        size_t kept = 0;

        for (size_t i = 0; i < r->n_rows; i++) {
                if (r->rows[i]->replicates)
                        r->rows[kept++] = r->rows[i];
                else
                        free(r->rows[i]);
        }
        r->n_rows = kept;
}

static int finish(const struct perf_result *r)
{
        uint64_t wrong = 0;
        json *j;
        int rc = 0;

        perf_print_end(r);
        for (size_t i = 0; i < r->n_rows; i++)
                wrong += r->rows[i]->wrong;
        if (r->o->json) {
                j = perf_json(r);
                rc = json_save(j, r->o->json);
                json_free(j);
        }
        if (rc < 0)
                return command_fail(&perf_spec, rc, EXIT_ENVIRONMENT);
        if (wrong) {
                err_set(-EIO, "%llu transfers arrived wrong", (unsigned long long)wrong);
                return command_fail(&perf_spec, -EIO, EXIT_INVALID);
        }
        if (perf_stopped) {
                err_set(-EINTR, "ended by a signal: these are the %zu rows measured until then", r->n_rows);
                return command_fail(&perf_spec, -EINTR, EXIT_INVALID);
        }
        return EXIT_DONE;
}

static int drive_failed(int rc)
{
        if (perf_stopped)
                err_set(rc, "ended by a signal before anything was measured");
        return command_fail(&perf_spec, rc,
                            perf_stopped         ? EXIT_INVALID
                            : is_environment(rc) ? EXIT_ENVIRONMENT
                                                 : EXIT_USAGE);
}

static int drive_over(struct perf_link *l, const struct perf_opts *o, const char *url)
{
        struct perf_result r = {.o = o};
        int rc = perf_connect(l, o, url), status;

        if (rc < 0)
                return drive_failed(rc);
        r.attr = l->attr;
        r.transport = l->attr.name;
        r.path = l->rx_mem->path;
        snprintf(r.peer, sizeof(r.peer), "%s", l->ep->peer);
        rc = plan_rows(&r, l->attr.msg_max);
        rc = rc ? rc : run_rows(l, &r);
        if (rc == 0)
                goodbye(l);
        else if (perf_stopped)
                drop_empty_rows(&r);
        status = rc < 0 && !perf_stopped ? drive_failed(rc) : finish(&r);
        for (size_t i = 0; i < r.n_rows; i++)
                free(r.rows[i]);
        free(r.rows);
        return status;
}

static int drive(const struct perf_opts *o, const char *url)
{
        struct perf_link l = {0};
        int rc, status;

        rc = tp_open(url, NULL, &l.ctx);
        if (rc < 0)
                return drive_failed(rc);
        pin(o->cpu_driver);
        status = drive_over(&l, o, url);
        perf_unlink(&l);
        tp_close(l.ctx);
        return status;
}

static int drive_here(struct perf_opts *o)
{
        struct helper h = {.fd = -1};
        int rc, status;

        /* Ends that one process starts for itself: nobody else is to take part. */
        if (!o->key.present)
                key_random(&o->key);
        rc = helper_start(&h, o);
        if (rc < 0)
                status = command_fail(&perf_spec, rc, perf_stopped ? EXIT_INVALID : EXIT_ENVIRONMENT);
        else
                status = drive(o, h.url);
        helper_end(&h, rc == 0 && status != EXIT_ENVIRONMENT && status != EXIT_USAGE);
        return status;
}

static int run(struct perf_opts *o)
{
        int rc;

        if (o->connect)
                return drive(o, o->connect);
        if (!o->listen)
                return drive_here(o);
        rc = listen_for_ever(o);
        if (rc < 0)
                return command_fail(&perf_spec, rc,
                                    perf_stopped         ? EXIT_INVALID
                                    : is_environment(rc) ? EXIT_ENVIRONMENT
                                                         : EXIT_USAGE);
        return EXIT_DONE;
}

int perf_main(int argc, char **argv)
{
        struct perf_opts o = {0};
        struct opts_parsed parsed;
        int status = command_parse(&perf_spec, argc, argv, &o, &parsed), rc;

        if (status == COMMAND_GO_ON) {
                catch_signals(SA_RESETHAND);
                rc = refine(&o, &parsed);
                status =
                    rc < 0 ? command_fail(&perf_spec, rc, rc == -ENOTSUP ? EXIT_ENVIRONMENT : EXIT_USAGE) : run(&o);
        }
        opts_free(&perf_spec, &o, &parsed);
        return status;
}
