/* sweep: options, the embedded server, the table at the end. */
#include <errno.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "injure.h"
#include "log.h"
#include "report.h"
#include "server.h"
#include "sweep.h"
#include "tools.h"
#include "transport.h"

#define TIMEOUT_NS (30 * NS_PER_S)
#define END_NS     (5 * NS_PER_S) /* for the embedded server to end */

struct sweep_cli {
        const char *config, *device, *tag, *output_dir, *key_file, *resume;
        struct opt_list workloads, baselines, transports, servers, model_roots, cpus;
        int64_t runs, seed;
        bool check, self_test, allow_external, allow_skip, insecure, require_weights;
};

#define O(n, t, f, ...)                                                            \
        {                                                                          \
                n, .type = t, .offset = offsetof(struct sweep_cli, f), __VA_ARGS__ \
        }
static const struct opt sweep_options[] = {
    O("config", OPT_STR, config, .metavar = "FILE", .required = true, .help = "what to measure (YAML)"),
    O("workloads", OPT_LIST, workloads, .metavar = "W", .help = "only these"),
    O("baselines", OPT_LIST, baselines, .metavar = "B", .help = "only these"),
    O("transports", OPT_LIST, transports, .metavar = "T", .help = "instead of the config's"),
    O("device", OPT_STR, device, .metavar = "D", .help = "instead of the config's: cpu, reference"),
    O("runs", OPT_INT, runs, .metavar = "N", .min = 1, .max = 100000, .help = "blocks, instead of the config's"),
    O("tag", OPT_STR, tag, .metavar = "TAG", .help = "first part of the results' file names"),
    O("output-dir", OPT_STR, output_dir, .metavar = "DIR", .help = "results go to DIR/WORKLOAD/TAG_TIME.json"),
    O("server", OPT_LIST, servers, .metavar = "URL",
      .help = "servers that run already, one URL per transport; default: one is started here"),
    O("seed", OPT_INT, seed, .metavar = "N", .min = 0, .max = 9007199254740992.0, .help = "instead of the config's"),
    O("model-root", OPT_LIST, model_roots, .metavar = "DIR", .help = "folders of models, before DJINN_MODEL_PATH"),
    O("require-weights", OPT_FLAG, require_weights, .help = "no synthetic weights: a missing checkpoint is an error"),
    O("key-file", OPT_STR, key_file, .metavar = "F", .help = "key shared with the servers (or DJINN_KEY_FILE)"),
    O("insecure", OPT_FLAG, insecure, .help = "go without a key off loopback, if the server agrees"),
    O("cpus", OPT_LIST, cpus, .metavar = "N", .help = "core of the client and core of the embedded server"),
    O("resume", OPT_STR, resume, .metavar = "FILE",
      .help = "go on with an interrupted result at its next block, then with the workloads after it"),
    O("check", OPT_FLAG, check, .help = "say what would run and what it would send; run nothing"),
    O("self-test", OPT_FLAG, self_test, .help = "every row twice: the A/A noise floor"),
    O("allow-external", OPT_FLAG, allow_external, .help = "let the config start programs (external baselines)"),
    O("allow-skip", OPT_FLAG, allow_skip, .help = "skipped rows do not make the exit status 1"),
};
#undef O

const struct opts_spec sweep_spec = {
    .name = "djinnbench sweep",
    .usage = "--config FILE [options]",
    .about = "Runs every workload of the config in every baseline over every transport, in blocks of random order, "
             "checks that all did the same job, writes one JSON file per workload and prints the overhead table. "
             "Exit status: 0 all rows are valid, 1 a row is not, 2 wrong use, 3 nothing could run.",
    .table = sweep_options,
    .count = ARRAY_LEN(sweep_options),
};

static volatile sig_atomic_t stop;

static void on_signal(int sig)
{
        (void)sig;
        stop = 1;
}

static void catch_signals(void)
{
        struct sigaction sa = {.sa_handler = on_signal};

        sigaction(SIGINT, &sa, NULL);
        sigaction(SIGTERM, &sa, NULL);
        signal(SIGPIPE, SIG_IGN);
}

/* ---- the embedded server ---- */

struct embedded {
        pid_t pid;
        struct auth_key key;
        char urls[EXP_TRANSPORTS_MAX][TP_URL_MAX];
};

static void pin(int cpu)
{
        cpu_set_t set;

        if (cpu < 0)
                return;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set) < 0)
                log_warn("cannot run on core %d: %s", cpu, strerror(errno));
}

_Noreturn static void serve_child(const struct experiment *e, const struct sweep_cli *cli, const struct auth_key *key,
                                  int ready, int cpu, pid_t parent)
{
        static char names[EXP_TRANSPORTS_MAX][64];
        const char *urls[EXP_TRANSPORTS_MAX];
        struct server_opts so = {.urls = urls,
                                 .nurls = e->ntransports,
                                 .device = e->device,
                                 .threads = (int)e->threads,
                                 .model_roots = cli->model_roots.at,
                                 .nmodel_roots = cli->model_roots.count,
                                 .key = *key,
                                 .ready_fd = ready,
                                 .stop = &stop,
                                 .cpu = cpu};
        int rc;

        prctl(PR_SET_PDEATHSIG, SIGTERM);
        if (getppid() != parent)
                _exit(EXIT_ENVIRONMENT);
        signal(SIGINT, SIG_IGN); /* Ctrl-C is for the client, which then ends us */
        for (size_t t = 0; t < e->ntransports; t++) {
                if (!strcmp(e->transports[t], "shm"))
                        snprintf(names[t], sizeof names[t], "shm://sweep-%d", (int)parent);
                else
                        snprintf(names[t], sizeof names[t], "%s://127.0.0.1:0", e->transports[t]);
                urls[t] = names[t];
        }
        rc = server_run(&so);
        if (rc < 0)
                fprintf(stderr, "djinnbench sweep: embedded server: %s\n", err_str(rc));
        _exit(rc < 0 ? EXIT_ENVIRONMENT : EXIT_DONE);
}

/* The URLs that the server listens on, one a line, in the order of the transports. */
static int read_urls(int fd, struct embedded *em, size_t n)
{
        FILE *f = fdopen(fd, "r");
        int rc = 0;

        if (!f) {
                close(fd);
                return err_set(-errno, "cannot read from the embedded server");
        }
        for (size_t t = 0; t < n && rc == 0; t++) {
                bool got = false;

                while (!stop && !(got = fgets(em->urls[t], TP_URL_MAX, f)) && ferror(f) && errno == EINTR)
                        clearerr(f);
                em->urls[t][strcspn(em->urls[t], "\n")] = 0;
                if (stop)
                        rc = err_set(-EINTR, "interrupted before anything was measured");
                else if (!got)
                        rc = err_set(-ECONNREFUSED, "the embedded server did not start");
        }
        fclose(f);
        return rc;
}

static int start_embedded(const struct experiment *e, const struct sweep_cli *cli, int cpu, struct embedded *em)
{
        pid_t parent = getpid();
        int fds[2];

        key_random(&em->key);
        if (pipe(fds) < 0)
                return err_set(-errno, "cannot make a pipe");
        fflush(NULL);
        em->pid = fork();
        if (em->pid == 0) {
                close(fds[0]);
                serve_child(e, cli, &em->key, fds[1], cpu, parent);
        }
        close(fds[1]);
        if (em->pid < 0) {
                close(fds[0]);
                return err_set(-errno, "cannot start the embedded server");
        }
        return read_urls(fds[0], em, e->ntransports);
}

/* It ends by itself when told; one that hangs must not keep the results from being shown. */
static void end_embedded(struct embedded *em)
{
        const struct timespec nap = {.tv_nsec = NS_PER_MS};
        uint64_t deadline = clock_ns() + END_NS;
        pid_t rc;

        if (em->pid <= 0)
                return;
        kill(em->pid, SIGTERM);
        while ((rc = waitpid(em->pid, NULL, WNOHANG)) == 0 && clock_ns() < deadline)
                nanosleep(&nap, NULL);
        if (rc != 0)
                return;
        log_warn("the embedded server did not end within %d s and was killed", (int)(END_NS / NS_PER_S));
        kill(em->pid, SIGKILL);
        while (waitpid(em->pid, NULL, 0) < 0 && errno == EINTR)
                ;
}

/* ---- transports and servers ---- */

/* How many servers are named; without --server the one, if any, of the config or the environment. Empty is unset. */
static size_t named_servers(const struct experiment *e, const struct sweep_cli *cli, const char **one)
{
        const char *from[] = {e->server_address, getenv("DJINN_SERVER_ADDRESS"), getenv("GENIE_SERVER_ADDRESS")};

        *one = NULL;
        for (size_t i = 0; i < ARRAY_LEN(from) && !*one; i++)
                *one = from[i] && *from[i] ? from[i] : NULL;
        return cli->servers.count ? cli->servers.count : *one != NULL;
}

/* -EINVAL: none that a sweep can use; -ENODEV: one that this build or this host does not have. */
static int check_transport(const char *name)
{
        const struct tp_backend *b = tp_backends;

        while (b->scheme && strcmp(b->scheme, name))
                b++;
        if (!b->scheme || !strcmp(b->scheme, "null") || !strcmp(b->scheme, "fault"))
                return err_set(-EINVAL, "\"%s\" is not a transport that a sweep can use; see `djinnbench list`", name);
        if (tp_unavailable(b))
                return err_set(-ENODEV, "transport %s: %s", b->scheme, tp_unavailable(b));
        if (!strcmp(b->scheme, "loop"))
                return err_set(-EINVAL, "transport loop joins two ends of one process; a sweep has two");
        return 0;
}

/* With servers given, the transports are theirs. */
static int take_servers(struct experiment *e, const struct sweep_cli *cli, struct sweep_opts *o)
{
        static struct tp_url parsed[EXP_TRANSPORTS_MAX];
        const char *one;
        size_t n = named_servers(e, cli, &one);

        if (n > EXP_TRANSPORTS_MAX)
                return err_set(-EINVAL, "more than %d servers", EXP_TRANSPORTS_MAX);
        if (n && e->ntransports && n != e->ntransports)
                log_info("measuring over the transports of the servers given, not over all of the config's");
        for (size_t i = 0; i < n; i++) {
                const char *url = cli->servers.count ? cli->servers.at[i] : one;
                int rc = tp_url_parse(url, &parsed[i]);

                if (rc == 0)
                        rc = check_transport(parsed[i].scheme);
                if (rc < 0)
                        return err_trail(rc, "in the server's address %s", url);
                o->urls[i] = url;
                e->transports[i] = parsed[i].scheme;
        }
        if (n)
                e->ntransports = n;
        return (int)n;
}

/* Those that a server's will replace need not be there, but must be transports. */
static int choose_transports(struct experiment *e, const struct sweep_cli *cli)
{
        const char *one;
        bool replaced = named_servers(e, cli, &one) > 0;

        if (cli->transports.count > EXP_TRANSPORTS_MAX)
                return err_set(-EINVAL, "--transports: more than %d", EXP_TRANSPORTS_MAX);
        for (size_t i = 0; i < cli->transports.count; i++)
                e->transports[i] = cli->transports.at[i];
        if (cli->transports.count)
                e->ntransports = cli->transports.count;
        for (size_t i = 0; i < e->ntransports; i++) {
                int rc = check_transport(e->transports[i]);

                if (rc < 0 && !(replaced && rc == -ENODEV))
                        return rc;
        }
        if (!e->ntransports) /* none named: the best that is there */
                for (const struct tp_backend *b = tp_backends; b->scheme && !e->ntransports; b++)
                        if (!tp_unavailable(b) && strcmp(b->scheme, "loop"))
                                e->transports[e->ntransports++] = b->scheme;
        return 0;
}

static int load_key(const struct sweep_cli *cli, struct auth_key *key)
{
        const char *path = cli->key_file ? cli->key_file : getenv("DJINN_KEY_FILE");

        return path && *path ? key_load(path, key) : 0;
}

/* Cores of client and server: as told, else the last two that we may use; one core for both is warned of. */
static int choose_cpus(const struct sweep_cli *cli, int cpu[2])
{
        cpu_set_t set;
        int n = 0;

        cpu[0] = cpu[1] = -1;
        for (size_t i = 0; i < cli->cpus.count; i++) {
                char *end;
                long v = strtol(cli->cpus.at[i], &end, 10);

                if (*end || v < 0 || v >= CPU_SETSIZE || i > 1)
                        return err_set(-EINVAL, "--cpus: expected one or two cores, such as --cpus 0 1");
                cpu[i] = (int)v;
        }
        if (cli->cpus.count || sched_getaffinity(0, sizeof set, &set) < 0)
                return 0;
        for (int c = CPU_SETSIZE - 1; c >= 0 && n < 2; c--)
                if (CPU_ISSET(c, &set))
                        cpu[n++] = c;
        if (n < 2) {
                log_warn("one core for both ends: every number includes waiting for the other to be scheduled");
                cpu[0] = cpu[1] = -1;
        }
        return 0;
}

/* ---- the table ---- */

struct written {
        struct report_source at[EXP_WORKLOADS_MAX];
        char paths[EXP_WORKLOADS_MAX][1024];
        size_t n;
        unsigned pairs, missed; /* self-test: twins whose ratio has an interval, and those of them without 1 in it */
};

/* Self-test: the interval of a twin's ratio should have 1 in it. */
static void count_twins(struct written *w, const json *doc)
{
        for (const json *r = json_first(json_get(json_get(doc, "workload"), "results")); r; r = json_next(r)) {
                const json *ci = json_get(json_get(json_get(r, "aa"), "ratio"), "ci95");
                double lo = json_num(json_get(ci, "lo"), 1), hi = json_num(json_get(ci, "hi"), 1);

                if (!json_is_object(ci))
                        continue;
                w->pairs++;
                if (lo <= 1 && hi >= 1)
                        continue;
                w->missed++;
                printf("A/A: %s over %s differs from itself: ratio in [%.4f, %.4f]\n",
                       json_str(json_get(r, "baseline"), "?"), json_str(json_get(r, "transport"), "?"), lo, hi);
        }
}

/* 95 % intervals miss in 5 % of the cases: the most misses of n that chance explains, the 95 % quantile of the binomial
 * distribution. */
static unsigned misses_allowed(unsigned n)
{
        const double p = 0.05;
        double sum = 0;
        unsigned k = 0;

        for (;; k++) {
                sum += exp(lgamma(n + 1.0) - lgamma(k + 1.0) - lgamma(n - k + 1.0) + k * log(p) + (n - k) * log1p(-p));
                if (sum >= 0.95 || k == n)
                        return k;
        }
}

static bool twins_agree(const struct written *w)
{
        unsigned allowed = misses_allowed(w->pairs);

        if (!w->pairs)
                printf("A/A: no pair of rows has an interval: nothing is known of the noise\n");
        else
                printf("A/A: %u of %u pairs differ from themselves; chance explains up to %u\n", w->missed, w->pairs,
                       allowed);
        return w->pairs && w->missed <= allowed;
}

static void finished(void *arg, const json *doc, const char *path)
{
        struct written *w = arg;

        count_twins(w, doc);
        if (w->n == EXP_WORKLOADS_MAX)
                return;
        snprintf(w->paths[w->n], sizeof w->paths[0], "%s", path);
        if (report_load(w->paths[w->n], &w->at[w->n]) < 0)
                log_error("%s", err_text());
        else
                w->n++;
}

static void print_reasons(const struct written *w)
{
        for (size_t i = 0; i < w->n; i++) {
                const json *wl = json_get(w->at[i].doc, "workload");

                for (const json *r = json_first(json_get(wl, "results")); r; r = json_next(r)) {
                        const json *v = json_get(r, "validity");
                        const char *verdict = json_str(json_get(v, "verdict"), "?");

                        if (strcmp(verdict, "VALID"))
                                fprintf(stderr, "%s: %s over %s: %s: %s\n", json_str(json_get(wl, "workload"), "?"),
                                        json_str(json_get(r, "baseline"), "?"), json_str(json_get(r, "transport"), "?"),
                                        verdict, json_str(json_get(v, "reason"), ""));
                }
        }
}

static int conclude(struct written *w, const struct sweep_outcome *out, const struct sweep_cli *cli)
{
        int rc = w->n ? report_write(stdout, w->at, w->n, REPORT_TABLE_1, REPORT_MARKDOWN) : 0;
        bool noisy = cli->self_test && !twins_agree(w);

        if (rc < 0)
                log_error("%s", err_text());
        print_reasons(w);
        for (size_t i = 0; i < w->n; i++)
                fprintf(stderr, "written: %s\n", w->paths[i]);
        fprintf(stderr, "%u rows valid, %u not, %u skipped%s\n", out->valid, out->invalid, out->skipped,
                out->interrupted ? "; interrupted: what was measured before is written" : "");
        for (size_t i = 0; i < w->n; i++)
                report_free(&w->at[i]);
        if (rc < 0 || out->invalid || out->interrupted || noisy || !out->valid)
                return EXIT_INVALID;
        return out->skipped && !cli->allow_skip ? EXIT_INVALID : EXIT_DONE;
}

/* ---- putting it together ---- */

static int measure(struct experiment *e, const struct sweep_cli *cli, struct sweep_opts *o, int nservers)
{
        static struct written w;
        struct embedded em = {0};
        struct sweep_outcome out;
        int cpu[2], rc = choose_cpus(cli, cpu), status;
        cpu_set_t before; /* our being pinned is none of an external program's business */

        w = (struct written){0};
        if (rc < 0)
                return command_fail(&sweep_spec, rc, EXIT_USAGE);
        if (sched_getaffinity(0, sizeof before, &before) == 0)
                o->cpus = &before;
        if (!nservers) {
                rc = start_embedded(e, cli, cpu[1], &em);
                for (size_t t = 0; t < e->ntransports; t++)
                        o->urls[t] = em.urls[t];
                o->key = em.key;
        }
        pin(cpu[0]);
        o->cpu_peer = cpu[1];
        o->finished = finished;
        o->arg = &w;
        if (rc == 0)
                rc = sweep_run(o, &out);
        end_embedded(&em);
        if (rc < 0)
                status = command_fail(&sweep_spec, rc,
                                      stop            ? EXIT_INVALID
                                      : rc == -EINVAL ? EXIT_USAGE
                                                      : EXIT_ENVIRONMENT);
        else
                status = conclude(&w, &out, cli);
        return status;
}

static int run(struct experiment *e, const struct sweep_cli *cli, struct sweep_opts *o)
{
        int rc = choose_transports(e, cli), nservers;

        if (rc < 0)
                return command_fail(&sweep_spec, rc, rc == -ENODEV ? EXIT_ENVIRONMENT : EXIT_USAGE);
        nservers = take_servers(e, cli, o);
        if (nservers < 0)
                return command_fail(&sweep_spec, nservers, nservers == -ENODEV ? EXIT_ENVIRONMENT : EXIT_USAGE);
        rc = load_key(cli, &o->key);
        if (rc < 0)
                return command_fail(&sweep_spec, rc, EXIT_USAGE);
        o->external_server = nservers > 0;
        if (cli->check) {
                rc = sweep_check(o, stdout);
                return rc < 0 ? command_fail(&sweep_spec, rc, EXIT_INVALID) : EXIT_DONE;
        }
        return measure(e, cli, o, nservers);
}

static int override(struct experiment *e, const struct sweep_cli *cli, const struct opts_parsed *parsed)
{
        if (cli->device)
                e->device = cli->device;
        if (opts_given(&sweep_spec, parsed, "runs"))
                e->runs = cli->runs;
        if (opts_given(&sweep_spec, parsed, "seed"))
                e->seed = (uint64_t)cli->seed;
        if (cli->tag) {
                if (!conf_name_ok(cli->tag))
                        return err_set(-EINVAL,
                                       "--tag: expected 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot");
                e->tag = cli->tag;
        }
        for (size_t i = 0; i < cli->workloads.count; i++) {
                size_t k = 0;

                while (k < e->nworkloads && strcmp(e->workloads[k].name, cli->workloads.at[i]))
                        k++;
                if (k == e->nworkloads)
                        return err_set(-EINVAL, "--workloads: %s has no workload \"%s\"", cli->config,
                                       cli->workloads.at[i]);
        }
        for (size_t i = 0; i < cli->baselines.count; i++) {
                size_t k = 0;

                while (k < e->nbaselines && strcmp(e->baselines[k].name, cli->baselines.at[i]))
                        k++;
                if (k == e->nbaselines)
                        return err_set(-EINVAL, "--baselines: %s has no baseline \"%s\"", cli->config,
                                       cli->baselines.at[i]);
        }
        return 0;
}

/* What the derived metrics refer to; a name that nothing bears would leave them out without a word. */
static void warn_of_names(const struct experiment *e)
{
        static const char *const keys[] = {"reference_baseline", "blind_baseline", "target_baseline"};
        const char *names[] = {e->reference_baseline, e->blind_baseline, e->target_baseline};
        const struct conf_node *given = conf_get(conf_root(e->doc), "experiment");

        for (size_t k = 0; k < ARRAY_LEN(keys); k++) {
                size_t i = 0;

                if (!names[k] || !given || !conf_get(given, keys[k]))
                        continue;
                while (i < e->nbaselines && strcmp(e->baselines[i].name, names[k]))
                        i++;
                if (i == e->nbaselines)
                        fprintf(stderr, "djinnbench sweep: %s: %s \"%s\" is none of its baselines\n", e->config_path,
                                keys[k], names[k]);
        }
}

int sweep_main(int argc, char **argv)
{
        static struct experiment e;
        struct sweep_cli cli = {0};
        struct opts_parsed parsed;
        struct sweep_opts o = {.exp = &e, .stop = &stop, .timeout_ns = TIMEOUT_NS, .argc = argc, .argv = argv};
        int status = command_parse(&sweep_spec, argc, argv, &cli, &parsed), rc;

        if (status == COMMAND_GO_ON) {
                rc = injure_init();
                if (rc == 0)
                        rc = experiment_load(cli.config, &e);
                if (rc == 0)
                        rc = override(&e, &cli, &parsed);
                o.insecure = cli.insecure;
                o.require_weights = cli.require_weights;
                o.self_test = cli.self_test;
                o.allow_external = cli.allow_external;
                o.resume = cli.resume;
                o.model_roots = cli.model_roots.at, o.nmodel_roots = cli.model_roots.count;
                o.workloads = cli.workloads.at, o.nworkloads = cli.workloads.count;
                o.baselines = cli.baselines.at, o.nbaselines = cli.baselines.count;
                o.output_dir = cli.output_dir ? cli.output_dir : e.result_dir ? e.result_dir : "./djinnbench-results";
                o.progress = stderr;
                o.progress_line = isatty(STDERR_FILENO);
                catch_signals();
                if (rc == 0)
                        warn_of_names(&e);
                status = rc < 0 ? command_fail(&sweep_spec, rc, EXIT_USAGE) : run(&e, &cli, &o);
                experiment_free(&e);
        }
        opts_free(&sweep_spec, &cli, &parsed);
        return status;
}
