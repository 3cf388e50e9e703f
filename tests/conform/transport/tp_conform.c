#include "conform.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static const struct backend backends[] = {
    {"loop", "loop://conform-%d", false, false},
    {"shm", "shm://conform-%d", true, false},
    {"tcp", "tcp://127.0.0.1:0", true, false},
    {"rdma", "rdma://127.0.0.1:0", true, false},
    {"rdma4", "rdma://127.0.0.1:0?qps=4", true, false},
    {"rdma+cm", "rdma://%s:0?cm=1", true, false},
    {"null", "null://", false, true},
    {"fault+loop", "fault+loop://conform-%d?eagain=20&delay_us=20&seed=7", false, false},
    {"fault+shm", "fault+shm://conform-%d?eagain=20&delay_us=20&seed=8", true, false},
    {"fault+tcp", "fault+tcp://127.0.0.1:0?eagain=20&delay_us=20&seed=9", true, false},
    {"fault+rdma", "fault+rdma://127.0.0.1:0?eagain=20&delay_us=20&seed=10", true, false},
};

static const struct tcase *const groups[] = {message_cases, bulk_cases, life_cases, device_cases, thousand_cases};

static const struct backend *find_backend(const char *name)
{
        for (size_t i = 0; i < ARRAY_LEN(backends); i++)
                if (!strcmp(backends[i].name, name))
                        return &backends[i];
        return NULL;
}

static const struct tcase *find_case(const char *name)
{
        for (size_t g = 0; g < ARRAY_LEN(groups); g++)
                for (const struct tcase *c = groups[g]; c->name; c++)
                        if (!strcmp(c->name, name))
                                return c;
        return NULL;
}

/* Asked before there are two sides: one that skips by itself looks to the other like one that died. */
static const char *unavailable(const struct backend *b)
{
        const char *scheme = strncmp(b->url, "fault+", 6) ? b->url : b->url + 6;

        for (const struct tp_backend *t = tp_backends; t->scheme; t++)
                if (strlen(t->scheme) == strcspn(scheme, ":") && !strncmp(t->scheme, scheme, strlen(t->scheme)))
                        return tp_unavailable(t);
        return NULL;
}

/* Why this case says nothing about this backend, or NULL. */
static const char *not_for(const struct backend *b, const struct tcase *c)
{
        bool fault = !strncmp(b->name, "fault+", 6);

        if (strstr(b->url, "%s") && !getenv("DJINN_RDMA_HOST"))
                return "DJINN_RDMA_HOST names no address of an RDMA device's network interface";
        if (b->one_sided_only != !!(c->flags & ONLY_NULL))
                return b->one_sided_only ? "nothing arrives over null" : "a case for null only";
        if ((c->flags & PROCESSES) && !b->processes)
                return "both ends are in one process, which cannot lose one of them";
        if ((c->flags & ONLY_FAULT) && !fault)
                return "a case for the fault wrapper only";
        if ((c->flags & NOT_FAULT) && fault)
                return "the wrapper's delays are no property of the backend";
        if ((c->flags & ONLY_PORTS) && !strstr(b->url, ":0"))
                return "this backend's addresses have no port";
        return NULL;
}

struct run {
        const struct backend *backend;
        const struct tcase *tc;
        int oob[2];
};

/* %d becomes the process id, %s the address of an RDMA device's network interface. */
static void make_url(char out[TP_URL_MAX], const char *pattern, int pid)
{
        const char *host = getenv("DJINN_RDMA_HOST"), *at = strchr(pattern, '%');

        if (!at)
                strcpy(out, pattern);
        else if (at[1] == 's')
                snprintf(out, TP_URL_MAX, "%.*s%s%s", (int)(at - pattern), pattern, host, at + 2);
        else
                snprintf(out, TP_URL_MAX, "%.*s%d%s", (int)(at - pattern), pattern, pid, at + 2);
}

static void run_side(const struct run *r, bool is_a, int pid)
{
        struct side s = {.backend = r->backend, .is_a = is_a, .oob = r->oob[!is_a]};
        struct tp_open_opts opts = {.sleepy = !!(r->tc->flags & SLEEPY)};

        s.opts = opts;
        make_url(s.url, r->backend->url, pid);
        prng_seed(&s.prng, 2 + is_a);
        if (!(r->tc->flags & (BARE | ONLY_NULL))) {
                side_open(&s);
                if (is_a) {
                        side_learn_url(&s);
                        side_connect(&s, &s.ep);
                } else {
                        side_listen(&s);
                        side_accept(&s, &s.ep);
                }
        }
        (is_a ? r->tc->a : r->tc->b)(&s);
        if (s.ctx)
                tp_close(s.ctx);
        free(s.queue);
        free(s.open_cookies);
        close(s.oob);
}

static void *thread_b(void *arg)
{
        run_side(arg, false, getpid());
        return NULL;
}

static int run_threads(const struct run *r)
{
        pthread_t t;

        if (pthread_create(&t, NULL, thread_b, (void *)(uintptr_t)r) != 0)
                FAIL("no thread");
        run_side(r, true, getpid());
        pthread_join(t, NULL);
        return 0;
}

/* A child that was killed is what cases about death want; every other end of it counts. */
static int child_verdict(pid_t pid, const struct tcase *tc)
{
        int status;

        if (waitpid(pid, &status, 0) != pid)
                FAIL("waitpid: %s", strerror(errno));
        if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && (tc->flags & PROCESSES))
                return 0;
        if (WIFEXITED(status))
                return WEXITSTATUS(status);
        FAIL("side b died of signal %d", WTERMSIG(status));
}

static int run_processes(const struct run *r)
{
        pid_t parent = getpid(), pid;

        fflush(NULL);
        pid = fork();
        if (pid < 0)
                FAIL("fork: %s", strerror(errno));
        if (pid == 0) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                close(r->oob[0]);
                run_side(r, false, parent);
                exit(0);
        }
        close(r->oob[1]);
        run_side(r, true, parent);
        return child_verdict(pid, r->tc);
}

static int run_null(const struct run *r)
{
        run_side(r, true, getpid());
        return 0;
}

static void list(void)
{
        for (size_t g = 0; g < ARRAY_LEN(groups); g++)
                for (const struct tcase *c = groups[g]; c->name; c++)
                        puts(c->name);
}

int main(int argc, char **argv)
{
        struct run r;
        const char *reason;

        if (argc == 2 && !strcmp(argv[1], "--list")) {
                list();
                return 0;
        }
        if (argc != 3 || !(r.backend = find_backend(argv[1])) || !(r.tc = find_case(argv[2]))) {
                fprintf(stderr, "usage: tp_conform BACKEND CASE | --list\n");
                return 2;
        }
        reason = not_for(r.backend, r.tc);
        if (!reason)
                reason = unavailable(r.backend);
        if (reason) {
                fprintf(stderr, "skipped: %s over %s: %s\n", r.tc->name, r.backend->name, reason);
                return EXIT_SKIP;
        }
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, r.oob) < 0)
                FAIL("socketpair: %s", strerror(errno));
        alarm(170);
        if (r.backend->one_sided_only)
                return run_null(&r);
        return r.backend->processes ? run_processes(&r) : run_threads(&r);
}
