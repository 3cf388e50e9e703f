/*
 * What a message costs beside its bytes: `tp_hotpath BACKEND OP COUNT [INJURY]` moves COUNT messages of 64 bytes between
 * two contexts of one thread and demands that from the first to the last of them, at both ends, this program's own code
 *   - allocates and maps nothing, takes no lock and writes no log line: these calls are wrapped at link time, so what a
 *     library below (a verbs provider, the C library) does is its own;
 *   - makes no more system calls than the medium needs: none over loop, null and shm; over tcp those stated in the
 *     table. Every system call of the thread goes through a seccomp filter to a second thread, which counts it and lets
 *     it pass; a clock read through the vDSO is none. An end that hears nothing of the other one, as in one-sided
 *     traffic over shm, looks now and then whether it has died: so often in a second, however many messages there are.
 * The first tenth is not counted: buffers grow to their size then.
 *
 * INJURY (alloc, lock, log, call) does the forbidden thing once, in the middle: the test of the test.
 * Exit status 77: not to be had here, the last line says why.
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "log.h"
#include "transport.h"

#define EXIT_SKIP   77
#define LEN         64u
#define SLOTS       64u
#define BATCH       16u /* posts before the other end is looked at */
#define PATIENCE_NS (30 * NS_PER_S)
#define LIMIT_S     170

#define FAIL(...)                                               \
        do {                                                    \
                fprintf(stderr, "FAILED: line %d: ", __LINE__); \
                fprintf(stderr, __VA_ARGS__);                   \
                fputc('\n', stderr);                            \
                exit(1);                                        \
        } while (0)
#define OK(call)                                             \
        do {                                                 \
                int rc_ = (call);                            \
                if (rc_ < 0)                                 \
                        FAIL("%s: %s", #call, err_str(rc_)); \
        } while (0)

enum op { OP_SEND, OP_WRITE, OP_WRITE_IMM, OP_READ, OPS };

static const char *const op_names[OPS] = {"send", "write", "write_imm", "read"};

/* calls_per_1000: system calls per thousand messages that are in order; negative: not counted. tcp: a sendmsg for each,
 * and two or three receiving calls for the BATCH of them. rdma: the provider makes them. looks_per_s: epoll_wait calls
 * of both ends that are no message's. */
static const struct backend {
        const char *name, *url;
        int calls_per_1000, looks_per_s;
        bool arrives;
} backends[] = {
    {"loop", "loop://hotpath-%d", 0, 0, true},   {"null", "null://", 0, 0, false},
    {"shm", "shm://hotpath-%d", 0, 10000, true}, {"tcp", "tcp://127.0.0.1:0", 1500, 0, true},
    {"rdma", "rdma://127.0.0.1:0", -1, 0, true},
};

static const struct backend *backend;
static enum op op;

/* ---- what is counted ---- */

static struct {
        unsigned long allocs, locks, lines;
        const char *latest; /* the last forbidden call, for the message */
} seen;

static bool counting;

#define FORBIDDEN(counter, ret, name, params, args) \
        ret __real_##name params;                   \
        ret __wrap_##name params;                   \
        ret __wrap_##name params                    \
        {                                           \
                if (counting) {                     \
                        seen.counter++;             \
                        seen.latest = #name;        \
                }                                   \
                return __real_##name args;          \
        }

FORBIDDEN(allocs, void *, malloc, (size_t n), (n))
FORBIDDEN(allocs, void *, calloc, (size_t n, size_t m), (n, m))
FORBIDDEN(allocs, void *, realloc, (void *p, size_t n), (p, n))
FORBIDDEN(allocs, void *, aligned_alloc, (size_t a, size_t n), (a, n))
FORBIDDEN(allocs, int, posix_memalign, (void **p, size_t a, size_t n), (p, a, n))
FORBIDDEN(allocs, char *, strdup, (const char *s), (s))
FORBIDDEN(allocs, void, free, (void *p), (p))
FORBIDDEN(allocs, void *, mmap, (void *p, size_t n, int prot, int flags, int fd, off_t off),
          (p, n, prot, flags, fd, off))
FORBIDDEN(allocs, int, munmap, (void *p, size_t n), (p, n))
FORBIDDEN(locks, int, pthread_mutex_lock, (pthread_mutex_t * m), (m))
FORBIDDEN(locks, int, pthread_mutex_trylock, (pthread_mutex_t * m), (m))
FORBIDDEN(locks, int, pthread_rwlock_rdlock, (pthread_rwlock_t * l), (l))
FORBIDDEN(locks, int, pthread_rwlock_wrlock, (pthread_rwlock_t * l), (l))
FORBIDDEN(locks, int, pthread_spin_lock, (pthread_spinlock_t * l), (l))

void __real_log_line(enum log_level level, const char *fmt, ...);
void __wrap_log_line(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

void __wrap_log_line(enum log_level level, const char *fmt, ...)
{
        if (counting) {
                seen.lines++;
                seen.latest = fmt;
        }
}

/* ---- system calls ---- */

static int notices = -1; /* descriptor of the filter's notices, -1: nothing is counted */
static atomic_ulong calls, looks;
static atomic_int latest_call;

static bool is_look(int nr)
{
#ifdef __NR_epoll_wait
        if (nr == __NR_epoll_wait)
                return true;
#endif
        return nr == __NR_epoll_pwait;
}

static void *count_calls(void *arg)
{
        for (;;) {
                struct seccomp_notif n = {0};
                struct seccomp_notif_resp r = {.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};

                if (ioctl(notices, SECCOMP_IOCTL_NOTIF_RECV, &n) < 0)
                        continue;
                if (is_look(n.data.nr) && backend->looks_per_s) {
                        atomic_fetch_add(&looks, 1);
                } else {
                        atomic_fetch_add(&calls, 1);
                        atomic_store(&latest_call, n.data.nr);
                }
                r.id = n.id;
                ioctl(notices, SECCOMP_IOCTL_NOTIF_SEND, &r);
        }
        return NULL;
}

static void *wait_for_filter(void *arg)
{
        while (__atomic_load_n(&notices, __ATOMIC_ACQUIRE) < 0)
                ;
        return count_calls(arg);
}

/* From here on every system call of this thread is counted, but the end of the program. NULL, or why not. */
static const char *watch_calls(void)
{
        struct sock_filter code[] = {
            BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
            BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_exit_group, 1, 0),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        };
        struct sock_fprog program = {.len = ARRAY_LEN(code), .filter = code};
        pthread_t t;
        long fd;

        if (pthread_create(&t, NULL, wait_for_filter, NULL) != 0)
                return "no thread";
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
                return "this kernel does not let a program give up privileges, as a seccomp filter wants it";
        fd = syscall(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
        if (fd < 0)
                return "this kernel has no seccomp notices (5.5 and later)";
        __atomic_store_n(&notices, (int)fd, __ATOMIC_RELEASE);
        return NULL;
}

/* ---- both ends ---- */

static struct tp_ctx *ctx[2]; /* 0 posts, 1 is there */
static struct tp_ep *ep[2];
static struct tp_mem *mem;
static struct tp_rmem *rmem;
static uint64_t done, arrived;

struct dialling {
        char url[TP_URL_MAX];
        int rc;
        char why[512];
};

static void *dial(void *arg)
{
        struct dialling *d = arg;

        d->rc = tp_connect(ctx[0], d->url, clock_ns() + PATIENCE_NS, &ep[0]);
        snprintf(d->why, sizeof(d->why), "%s", err_text());
        return NULL;
}

/* Connecting waits for the other end, so for its time it gets a thread. */
static void join_ends(const char *url)
{
        struct tp_listener *l;
        struct dialling d;
        struct tp_event ev;
        pthread_t t;
        int rc;

        OK(tp_listen(ctx[1], url, &l));
        snprintf(d.url, sizeof(d.url), "%s", l->url);
        if (pthread_create(&t, NULL, dial, &d) != 0)
                FAIL("no thread");
        while ((rc = tp_accept(l, &ep[1])) == -EAGAIN)
                tp_poll(ctx[1], &ev, 1);
        OK(rc);
        pthread_join(t, NULL);
        if (d.rc < 0)
                FAIL("%s", d.why);
        tp_listener_close(l);
}

static void poll_end(int who)
{
        struct tp_event ev[BATCH];
        int n = tp_poll(ctx[who], ev, BATCH);

        for (int i = 0; i < n; i++) {
                if (ev[i].kind == TP_EV_DOWN || (ev[i].kind == TP_EV_DONE && ev[i].status < 0))
                        FAIL("the connection broke: %s", err_text());
                if (ev[i].kind == TP_EV_DONE) {
                        done++;
                        continue;
                }
                arrived++;
                if (ev[i].kind == TP_EV_MSG)
                        tp_release(ev[i].ep, ev[i].cookie);
        }
}

static int post(uint64_t i)
{
        uint64_t off = i % SLOTS * LEN;
        char *local = (char *)mem->region.addr + off;

        switch (op) {
        case OP_SEND:
                return tp_send(ep[0], local, LEN, 0, i);
        case OP_WRITE:
                return tp_write(ep[0], mem, local, LEN, rmem, off, 0, i);
        case OP_WRITE_IMM:
                return tp_write_imm(ep[0], mem, local, LEN, rmem, off, (uint32_t)i, 0, i);
        default:
                return tp_read(ep[0], mem, local, LEN, rmem, off, 0, i);
        }
}

static bool all_there(uint64_t n)
{
        bool told = op == OP_SEND || op == OP_WRITE_IMM;

        return done == n && (!told || !backend->arrives || arrived == n);
}

static void move(uint64_t from, uint64_t to)
{
        for (uint64_t i = from; i < to;) {
                uint64_t stop = to - i < BATCH ? to : i + BATCH;

                while (i < stop) {
                        int rc = post(i);

                        if (rc == -EAGAIN)
                                break;
                        if (rc < 0)
                                FAIL("post %llu: %s", (unsigned long long)i, err_str(rc));
                        done += rc == TP_COMPLETE;
                        i++;
                }
                do {
                        poll_end(1);
                        poll_end(0);
                } while (!all_there(i));
        }
}

/* ---- the test of the test ---- */

static void injure(const char *how)
{
        static pthread_mutex_t m = PTHREAD_MUTEX_INITIALIZER;

        if (!strcmp(how, "alloc")) {
                void *volatile p = malloc(1);

                free(p);
        } else if (!strcmp(how, "lock")) {
                pthread_mutex_lock(&m);
                pthread_mutex_unlock(&m);
        } else if (!strcmp(how, "log")) {
                log_debug("a line that nobody sees");
        } else if (!strcmp(how, "call")) {
                syscall(SYS_getppid);
        } else {
                FAIL("unknown injury %s", how);
        }
}

static void set_up(void)
{
        struct tp_key key;
        char url[TP_URL_MAX];
        int owner = backend->arrives ? 1 : 0;

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(url, sizeof(url), backend->url, getpid());
#pragma GCC diagnostic pop
        for (int i = 0; i < 2; i++) {
                int rc = tp_open(url, NULL, &ctx[i]);

                if (rc == -ENOTSUP || rc == -ENOENT) {
                        fprintf(stderr, "skipped: %s\n", err_text());
                        exit(EXIT_SKIP);
                }
                OK(rc);
        }
        if (backend->arrives)
                join_ends(url);
        else
                OK(tp_connect(ctx[0], url, clock_ns() + PATIENCE_NS, &ep[0]));
        OK(tp_alloc(ep[0], SLOTS * LEN, &mem));
        if (op == OP_SEND)
                return;
        struct tp_mem *theirs;

        OK(tp_alloc(ep[owner], SLOTS * LEN, &theirs));
        OK(tp_export_key(theirs, 0, SLOTS * LEN, &key));
        OK(tp_import_key(ep[0], &key, clock_ns() + PATIENCE_NS, &rmem));
}

struct made {
        unsigned long calls, looks;
        int latest;
};

static int verdict(uint64_t n, const struct made *m, uint64_t ns)
{
        bool good = !seen.allocs && !seen.locks && !seen.lines;
        bool silent = op == OP_WRITE || op == OP_READ;
        uint64_t looks_most = silent ? (uint64_t)backend->looks_per_s * ns / NS_PER_S + 2 : 0;

        printf("%llu x %s over %s: %lu allocations, %lu locks, %lu log calls", (unsigned long long)n, op_names[op],
               backend->name, seen.allocs, seen.locks, seen.lines);
        if (seen.latest)
                printf(" (the last: %s)", seen.latest);
        if (backend->calls_per_1000 >= 0) {
                printf(", %lu system calls", m->calls);
                if (m->calls * 1000 > (unsigned long)backend->calls_per_1000 * n) {
                        printf(" (at most %.3f for each; the last: number %d)", backend->calls_per_1000 / 1000.0,
                               m->latest);
                        good = false;
                }
                if (backend->looks_per_s) {
                        printf(", %lu looks at sockets in %.2f s", m->looks, (double)ns / NS_PER_S);
                        good = good && m->looks <= looks_most;
                }
        }
        puts(good ? ": in order" : ": FAILED");
        return !good;
}

static struct made now(void)
{
        return (struct made){atomic_load(&calls), atomic_load(&looks), atomic_load(&latest_call)};
}

static int index_of(const char *const *names, int n, const char *name)
{
        for (int i = 0; i < n; i++)
                if (!strcmp(names[i], name))
                        return i;
        return -1;
}

int main(int argc, char **argv)
{
        const char *why;
        struct made before, made;
        uint64_t n, first, begun;
        int which = -1;

        for (size_t i = 0; argc > 1 && i < ARRAY_LEN(backends); i++)
                if (!strcmp(backends[i].name, argv[1]))
                        backend = &backends[i];
        if (argc > 2)
                which = index_of(op_names, OPS, argv[2]);
        n = argc > 3 ? strtoull(argv[3], NULL, 10) : 0;
        if (!backend || which < 0 || n < 10) {
                fprintf(stderr, "usage: tp_hotpath BACKEND OP COUNT [alloc|lock|log|call]\n");
                return 2;
        }
        op = (enum op)which;
        alarm(LIMIT_S);
        set_up();
        why = backend->calls_per_1000 < 0 ? NULL : watch_calls();
        if (why) {
                fprintf(stderr, "skipped: %s\n", why);
                return EXIT_SKIP;
        }
        first = n / 10;
        move(0, first);
        before = now();
        begun = clock_ns();
        counting = true;
        move(first, first + n / 2);
        if (argc > 4)
                injure(argv[4]);
        move(first + n / 2, first + n);
        counting = false;
        made = now();
        made.calls -= before.calls;
        made.looks -= before.looks;
        return verdict(n, &made, clock_ns() - begun);
}
