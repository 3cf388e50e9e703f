/*
 * perf: processes. Every launch has two ends that are new: the driver is a child of this process; so is the peer when
 * both are here (a thread of the driver for loop, which has no other way). Elsewhere, --listen keeps a child that
 * serves one launch, and starts the next one when that is done.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "log.h"
#include "perf_inside.h"
#include "tools.h"

#define START_NS (10 * NS_PER_S)
#define END_NS   (2 * NS_PER_S) /* how long the other end may take to end by itself */

/* How a child that listens ended. */
enum served { SERVED_LAST = 10, SERVED_MORE, SERVED_BADLY };

volatile sig_atomic_t perf_stopped;
static volatile sig_atomic_t child_pids[2]; /* they are told, too */

static void on_signal(int sig)
{
        (void)sig;
        perf_stopped = 1;
        for (int i = 0; i < 2; i++)
                if (child_pids[i] > 0)
                        kill((pid_t)child_pids[i], SIGTERM);
}

/* Whoever cannot wait for an orderly end sends a second one. */
static void catch_signals(int flags)
{
        struct sigaction sa = {.sa_handler = on_signal, .sa_flags = SA_RESTART | flags};

        sigaction(SIGINT, &sa, NULL);
        sigaction(SIGTERM, &sa, NULL);
}

static void begin_child(pid_t parent)
{
        child_pids[0] = child_pids[1] = 0;
        catch_signals(0);
        signal(SIGPIPE, SIG_IGN);
        prctl(PR_SET_PDEATHSIG, SIGTERM); /* and so it takes its socket along, however the parent ends */
        if (getppid() != parent)
                _exit(EXIT_ENVIRONMENT);
}

/* A thousand connections are more files than most shells allow. */
static void many_files(void)
{
        struct rlimit r;

        if (getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < r.rlim_max) {
                r.rlim_cur = r.rlim_max;
                setrlimit(RLIMIT_NOFILE, &r);
        }
}

static int status_of(int rc)
{
        return perf_stopped ? EXIT_INVALID : rc == -EINVAL || rc == -EPERM ? EXIT_USAGE : EXIT_ENVIRONMENT;
}

/* ---- the peer ---- */

/* Serves one driver for one launch. served: whether it was agreed with. */
static int serve_driver(struct tp_ctx *ctx, struct tp_listener *tl, const struct perf_opts *o, const char *url,
                        bool *served, bool *last)
{
        struct perf_session s;
        int rc = perf_session_init(&s, o, false);

        s.url = url;
        rc = rc ? rc : perf_agree_serve(&s, ctx, tl);
        *served = rc == 0;
        *last = s.last;
        rc = rc ? rc : perf_serve_cases(&s);
        perf_session_free(&s);
        return rc;
}

/* Where a peer of ours says what its address is. */
struct start {
        const struct perf_opts *o;
        const char *listen;
        int fd;
};

static int peer_run(const struct start *s)
{
        struct tp_open_opts how = {.gpu_path = (enum tp_gpu_path)s->o->gpu_path};
        struct tp_listener *tl;
        struct tp_ctx *ctx;
        bool served = false, last;
        int rc = tp_open(s->listen, &how, &ctx);

        if (rc < 0)
                return rc;
        rc = tp_listen(ctx, s->listen, &tl);
        if (rc == 0) {
                rc = write(s->fd, tl->url, strlen(tl->url) + 1) < 0 ? -errno : 0;
                rc = rc ? rc : serve_driver(ctx, tl, s->o, s->listen, &served, &last);
        }
        tp_close(ctx);
        return rc;
}

static void peer_said(int rc)
{
        if (rc < 0 && !perf_stopped)
                log_error("perf, the other end: %s", err_str(rc));
}

static void *peer_thread(void *arg)
{
        struct start *s = arg;

        peer_said(peer_run(s));
        close(s->fd);
        return NULL;
}

struct helper { /* the other end, when it is here */
        struct start start;
        pthread_t thread;
        pid_t pid;
        bool is_thread, running;
        int fd;
        char listen[TP_URL_MAX], url[TP_URL_MAX];
};

static bool is_loop(const struct perf_opts *o)
{
        return o->transport && strstr(o->transport, "loop") != NULL;
}

static int hear_url(int fd, char url[TP_URL_MAX], const char *listen)
{
        struct pollfd p = {.fd = fd, .events = POLLIN};
        ssize_t n;
        int rc;

        do {
                rc = poll(&p, 1, (int)(START_NS / NS_PER_MS));
        } while (rc < 0 && errno == EINTR && !perf_stopped);
        if (rc != 1)
                return perf_stopped ? err_set(-EINTR, "ended by a signal")
                                    : err_set(-ETIMEDOUT, "the other end did not start within %u s",
                                              (unsigned)(START_NS / NS_PER_S));
        n = read(fd, url, TP_URL_MAX);
        if (n <= 0 || url[n - 1])
                return err_set(-ECHILD, "the other end could not listen on %s", listen);
        return 0;
}

/* "fault+tcp?eagain=5" names a transport and its parameters. */
static void local_url(const struct perf_opts *o, char out[TP_URL_MAX])
{
        int len = (int)strcspn(o->transport, "?");

        if (strstr(o->transport, "shm") || is_loop(o))
                snprintf(out, TP_URL_MAX, "%.*s://djinnbench-perf-%d%s", len, o->transport, (int)getpid(),
                         o->transport + len);
        else
                snprintf(out, TP_URL_MAX, "%.*s://127.0.0.1:0%s", len, o->transport, o->transport + len);
}

static int helper_start(struct helper *h, const struct perf_opts *o)
{
        pid_t parent = getpid();
        int pipe_fd[2], rc = 0;

        local_url(o, h->listen);
        h->is_thread = is_loop(o);
        if (pipe2(pipe_fd, O_CLOEXEC) < 0)
                return err_set(-errno, "cannot make a pipe: %s", strerror(errno));
        h->fd = pipe_fd[0];
        h->start = (struct start){.o = o, .listen = h->listen, .fd = pipe_fd[1]};
        if (h->is_thread) {
                rc = -pthread_create(&h->thread, NULL, peer_thread, &h->start);
        } else {
                fflush(NULL);
                h->pid = fork();
                rc = h->pid < 0 ? -errno : 0;
                if (h->pid == 0) {
                        begin_child(parent);
                        close(h->fd);
                        rc = peer_run(&h->start);
                        peer_said(rc);
                        _exit(rc < 0 ? EXIT_ENVIRONMENT : EXIT_DONE);
                }
                child_pids[1] = h->pid > 0 ? h->pid : 0;
                close(pipe_fd[1]);
        }
        if (rc < 0)
                return err_set(rc, "cannot start the other end: %s", strerror(-rc));
        h->running = true;
        rc = hear_url(h->fd, h->url, h->listen);
        if (rc == 0 && strchr(h->listen, '?') && !strchr(h->url, '?')) /* the driver's end takes them, too */
                snprintf(h->url + strlen(h->url), sizeof(h->url) - strlen(h->url), "%s", strchr(h->listen, '?'));
        return rc;
}

/* In good time, or by force. */
static void reap(pid_t pid)
{
        uint64_t until = clock_ns() + END_NS;

        while (waitpid(pid, NULL, WNOHANG) == 0) {
                if (clock_ns() > until)
                        kill(pid, SIGKILL);
                clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = NS_PER_MS}, NULL);
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
                        pthread_detach(h->thread); /* this process is about to end with an error */
        } else {
                child_pids[1] = 0;
                if (!well || perf_stopped)
                        kill(h->pid, SIGTERM);
                reap(h->pid);
        }
        close(h->fd);
}

/* ---- a launch ---- */

static int launch_over(struct perf_launch *l, const struct perf_opts *o, const char *url)
{
        struct perf_session s;
        int rc = perf_session_init(&s, o, true);

        s.url = url;
        rc = rc ? rc : perf_agree_drive(&s, l);
        rc = rc ? rc : perf_launch_run(&s, l);
        perf_session_free(&s);
        return rc;
}

/* The driver's process: what it finds is left in *l. */
static _Noreturn void driver_process(struct perf_launch *l, const struct perf_opts *o, const char *url, pid_t parent)
{
        struct helper h = {.fd = -1};
        int rc = 0;

        begin_child(parent);
        if (is_loop(o)) {
                rc = helper_start(&h, o);
                url = h.url;
        }
        rc = rc ? rc : launch_over(l, o, url);
        l->rc = rc;
        snprintf(l->why, sizeof(l->why), "%s", rc < 0 ? err_str(rc) : "");
        helper_end(&h, rc == 0);
        fflush(NULL);
        _exit(EXIT_DONE);
}

static void wait_driver(struct perf_launch *l, pid_t pid)
{
        int status;

        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
                ;
        child_pids[0] = 0;
        if (WIFSIGNALED(status)) {
                l->rc = -ECHILD;
                snprintf(l->why, sizeof(l->why), "the process that measures was ended by signal %d (%s)",
                         WTERMSIG(status), strsignal(WTERMSIG(status)));
        }
}

/* Both ends for one row, once. */
static int launch(struct perf_launch *l, const struct perf_opts *o)
{
        struct helper h = {.fd = -1};
        const char *url = o->connect;
        pid_t parent = getpid(), pid;
        int rc = 0;

        if (!url && !is_loop(o)) {
                rc = helper_start(&h, o);
                url = h.url;
        }
        if (rc == 0) {
                fflush(NULL);
                l->rc = -ECHILD;
                pid = fork();
                if (pid == 0)
                        driver_process(l, o, url, parent);
                rc = pid < 0 ? err_set(-errno, "cannot start a process: %s", strerror(errno)) : 0;
                if (pid > 0) {
                        child_pids[0] = pid;
                        if (perf_stopped)
                                kill(pid, SIGTERM); /* it came in between */
                        wait_driver(l, pid);
                        rc = l->rc < 0 ? err_set(l->rc, "%s", l->why) : 0;
                }
        }
        helper_end(&h, rc == 0);
        return rc;
}

/* ---- rows ---- */

static int row_add(struct perf_result *r, const struct perf_size *size, bool raw)
{
        struct perf_row *row = calloc(1, sizeof(*row));

        if (!row)
                return err_set(-ENOMEM, "no memory for results");
        row->test = (enum perf_test)r->o->test;
        row->size = size;
        row->raw = raw;
        hist_reset(&row->sum.hist);
        hist_reset(&row->sum.uncorrected);
        r->rows[r->n_rows++] = row;
        return 0;
}

static void row_take(struct perf_row *row, const struct perf_measure *m, const struct perf_info *info)
{
        struct perf_measure *sum = &row->sum;

        row->op = info->op;
        row->slots = info->slots;
        row->window = info->window;
        row->region_bytes = info->region_bytes;
        if (!m->iterations)
                return;
        sum->iterations += m->iterations;
        sum->bytes += m->bytes;
        sum->total_ns += m->total_ns;
        sum->local_ns += m->local_ns;
        sum->wrong += m->wrong;
        sum->checked += m->checked;
        sum->cpu_local_ns += m->cpu_local_ns;
        sum->cpu_peer_ns += m->cpu_peer_ns;
        sum->copied += m->copied;
        hist_merge(&sum->hist, &m->hist);
        hist_merge(&sum->uncorrected, &m->uncorrected);
        if (row->replicates == PERF_REPEATS_MAX || (row->test != PERF_LAT && !m->total_ns))
                return;
        for (int q = 0; q < PERF_QUANTILES; q++)
                row->tails[row->replicates][q] = hist_percentile(&m->hist, perf_quantiles[q].p);
        row->replicate[row->replicates++] = row->test == PERF_LAT ? hist_percentile(&m->hist, m->hist.n < 20 ? 0 : 50)
                                                                  : (double)m->iterations * 1e9 / (double)m->total_ns;
}

static void add_counters(json **sum, const char *text)
{
        json *one = text[0] ? json_parse(text, strlen(text), "counters") : NULL;

        if (one && !*sum)
                *sum = json_object();
        for (const json *v = json_first(one); v; v = json_next(v)) {
                const char *key = json_key(v);
                double before = json_num(json_get(*sum, key), 0);
                json *fresh = json_object();

                for (const json *old = json_first(*sum); old; old = json_next(old))
                        if (strcmp(json_key(old), key))
                                json_set_num(fresh, json_key(old), json_num(old, 0));
                json_set_num(fresh, key, before + json_num(v, 0));
                json_free(*sum);
                *sum = fresh;
        }
        json_free(one);
}

static void take_launch(struct perf_result *r, size_t i, const struct perf_launch *l)
{
        struct perf_row *row = r->rows[i];

        if (!l->agreed)
                return;
        if (!r->known)
                r->info = l->info;
        r->known = true;
        row_take(row, &l->ours, &l->info);
        if (l->one_way.known)
                row->one_way = l->one_way;
        add_counters(&row->counters_local, l->counters_local);
        add_counters(&row->counters_peer, l->counters_peer);
        if (r->o->raw)
                row_take(r->rows[i + 1], &l->raw, &l->info);
}

static int run_rows(struct perf_result *r, struct perf_launch *l)
{
        const struct perf_opts *o = r->o;
        size_t per_size = o->raw ? 2 : 1;
        uint64_t index = 0, all = o->n_sizes * (uint64_t)o->repeats;
        int rc = 0;

        for (size_t i = 0; i < r->n_rows && !rc; i += per_size) {
                for (int64_t k = 0; k < o->repeats && !rc; k++, index++) {
                        memset(l, 0, sizeof(*l));
                        l->size = r->rows[i]->size;
                        l->index = index;
                        l->first = index == 0;
                        l->last = index + 1 == all;
                        rc = perf_stopped ? err_set(-EINTR, "ended by a signal") : launch(l, o);
                        take_launch(r, i, l);
                }
                for (size_t j = 0; j < per_size; j++)
                        if (!rc || (perf_stopped && r->rows[i + j]->sum.iterations))
                                perf_print_row(r, r->rows[i + j]);
        }
        return rc;
}

static void row_free(struct perf_row *row)
{
        json_free(row->counters_local);
        json_free(row->counters_peer);
        free(row);
}

/* An early end leaves rows of which nothing was measured. */
static void drop_empty_rows(struct perf_result *r)
{
        size_t kept = 0;

        for (size_t i = 0; i < r->n_rows; i++) {
                if (r->rows[i]->sum.iterations)
                        r->rows[kept++] = r->rows[i];
                else
                        row_free(r->rows[i]);
        }
        r->n_rows = kept;
}

static int finish(const struct perf_result *r)
{
        uint64_t wrong = 0;
        json *j;
        int rc = 0;

        if (r->known)
                perf_print_end(r);
        for (size_t i = 0; i < r->n_rows; i++)
                wrong += r->rows[i]->sum.wrong;
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
        if (r->interrupted) {
                err_set(-EINTR, "ended by a signal: these are the %zu rows measured until then", r->n_rows);
                return command_fail(&perf_spec, -EINTR, EXIT_INVALID);
        }
        return EXIT_DONE;
}

static int plan_rows(struct perf_result *r)
{
        const struct perf_opts *o = r->o;
        int rc = 0;

        r->rows = calloc(2 * o->n_sizes, sizeof(*r->rows));
        if (!r->rows)
                return err_set(-ENOMEM, "no memory for results");
        for (size_t i = 0; i < o->n_sizes && !rc; i++) {
                rc = row_add(r, &o->sizes[i], false);
                if (!rc && o->raw)
                        rc = row_add(r, &o->sizes[i], true);
        }
        return rc;
}

static int drive(struct perf_opts *o)
{
        static struct perf_result r;
        struct perf_launch *l = mmap(NULL, sizeof(*l), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int rc = l == MAP_FAILED ? err_set(-errno, "no memory for results: %s", strerror(errno)) : 0, status;

        r.o = o;
        if (!o->connect && !o->key.present)
                key_random(&o->key); /* ends that we start ourselves: nobody else is to take part */
        rc = rc ? rc : plan_rows(&r);
        rc = rc ? rc : run_rows(&r, l);
        if (rc < 0 && perf_stopped)
                drop_empty_rows(&r);
        r.interrupted = perf_stopped && !(o->forever && r.n_rows);
        status = rc < 0 && !perf_stopped ? command_fail(&perf_spec, rc, status_of(rc)) : finish(&r);
        for (size_t i = 0; i < r.n_rows; i++)
                row_free(r.rows[i]);
        free(r.rows);
        return status;
}

/* ---- the end that listens ---- */

/* Takes drivers until one was agreed with and served. */
static int serve_one(const struct perf_opts *o, const char *url, int fd)
{
        struct tp_open_opts how = {.gpu_path = (enum tp_gpu_path)o->gpu_path};
        struct tp_listener *tl;
        struct tp_ctx *ctx;
        bool served = false, last = false;
        int rc = tp_open(url, &how, &ctx);

        if (rc < 0)
                return command_fail(&perf_spec, rc, status_of(rc));
        rc = tp_listen(ctx, url, &tl);
        if (rc == 0 && fd >= 0)
                rc = write(fd, tl->url, strlen(tl->url) + 1) < 0 ? -errno : 0;
        if (fd >= 0)
                close(fd);
        if (rc < 0) {
                tp_close(ctx);
                return command_fail(&perf_spec, rc, status_of(rc));
        }
        do {
                rc = serve_driver(ctx, tl, o, url, &served, &last);
                if (rc < 0 && rc != -EALREADY && !perf_stopped && !o->once)
                        log_warn("perf: %s", err_str(rc));
        } while (!served && !perf_stopped && (!o->once || rc == -EALREADY));
        tp_close(ctx);
        if (rc < 0 && o->once)
                return command_fail(&perf_spec, rc, status_of(rc));
        return rc == 0 ? last ? SERVED_LAST : SERVED_MORE : perf_stopped ? EXIT_DONE : SERVED_BADLY;
}

/* The next child listens where the first one did, whatever port that was given. */
static void keep_address(char url[TP_URL_MAX], const char *got)
{
        struct tp_url a, b;

        if (tp_url_parse(url, &a) < 0 || tp_url_parse(got, &b) < 0 || !b.port[0])
                return;
        snprintf(url, TP_URL_MAX, strchr(a.host, ':') ? "%s://[%.100s]:%s%s%s" : "%s://%.100s:%s%s%s", a.scheme, a.host,
                 b.port, a.query[0] ? "?" : "", a.query);
}

static const char *listens_everywhere(const char *url)
{
        struct tp_url u;

        return tp_url_parse(url, &u) == 0 && u.any ? ", and on this host's other addresses of that family" : "";
}

/* One child after another. Returns how it ended, or -errno. */
static int listen_once(const struct perf_opts *o, char url[TP_URL_MAX], bool first)
{
        char got[TP_URL_MAX];
        int fd[2] = {-1, -1}, status = 0;
        pid_t parent = getpid(), pid;

        if (first && pipe2(fd, O_CLOEXEC) < 0)
                return err_set(-errno, "cannot make a pipe: %s", strerror(errno));
        fflush(NULL);
        pid = fork();
        if (pid == 0) {
                begin_child(parent);
                if (first)
                        close(fd[0]);
                _exit(serve_one(o, url, fd[1]));
        }
        if (first)
                close(fd[1]);
        child_pids[0] = pid > 0 ? pid : 0;
        if (pid < 0)
                return err_set(-errno, "cannot start a process: %s", strerror(errno));
        if (perf_stopped)
                kill(pid, SIGTERM);
        if (first && hear_url(fd[0], got, url) == 0) {
                keep_address(url, got);
                log_info("perf: listening on %s%s", got, listens_everywhere(o->listen));
        }
        if (first)
                close(fd[0]);
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
                ;
        child_pids[0] = 0;
        if (WIFSIGNALED(status)) {
                log_warn("perf: the process that served was ended by signal %d (%s)", WTERMSIG(status),
                         strsignal(WTERMSIG(status)));
                clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = 100 * NS_PER_MS}, NULL);
                return SERVED_BADLY;
        }
        return WEXITSTATUS(status);
}

static int listen_for_ever(const struct perf_opts *o)
{
        char url[TP_URL_MAX];
        int how = SERVED_MORE;

        snprintf(url, sizeof(url), "%s", o->listen);
        for (bool first = true; how >= SERVED_LAST; first = false) {
                how = listen_once(o, url, first);
                if (perf_stopped)
                        return o->once ? EXIT_INVALID : EXIT_DONE; /* how it is meant to end */
                if (o->once && how == SERVED_LAST)
                        return EXIT_DONE;
                if (o->once && how == SERVED_BADLY)
                        return EXIT_ENVIRONMENT;
        }
        return how < 0 ? command_fail(&perf_spec, how, EXIT_ENVIRONMENT) : how;
}

int perf_run(struct perf_opts *o)
{
        catch_signals(SA_RESETHAND);
        perf_allowed();
        many_files();
        return o->listen ? listen_for_ever(o) : drive(o);
}
