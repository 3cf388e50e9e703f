/* Starting, asking and ending a program that speaks lines. */
#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "clock.h"
#include "err.h"

#define SLICE_MS     100      /* a signal may come just before poll(): `stop` is looked at this often */
#define LAST_WORD_NS NS_PER_S /* for a child that closed its output to be found dead */
#define BUF_FIRST    65536u

struct child {
        struct child_opts o;
        pid_t pid;
        int pidfd, in, out; /* in: we write; out: we read, without blocking both */
        char *buf;
        size_t len, cap;
        bool dead;
        char how[96]; /* it ended */
};

/* ---- starting ---- */

/* Between fork and exec: nothing that takes a lock. Returns, with errno, only where it fails. */
static void become(const struct child_opts *o, int in, int out, pid_t parent)
{
        sigset_t none;

        setpgid(0, 0);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
                _exit(1);
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        signal(SIGPIPE, SIG_DFL);
        if (o->cpus)
                sched_setaffinity(0, sizeof(*o->cpus), o->cpus);
        if (dup2(in, STDIN_FILENO) < 0 || dup2(out, STDOUT_FILENO) < 0)
                return;
        close_range(STDERR_FILENO + 1, ~0U, CLOSE_RANGE_CLOEXEC); /* connections and models are none of its business */
        execvp(o->argv[0], (char *const *)o->argv);
}

/* The pipe `fail` closes by exec, or brings the errno of what failed before. */
static int await_exec(struct child *c, int fail)
{
        int code = 0;
        ssize_t n;

        do
                n = read(fail, &code, sizeof(code));
        while (n < 0 && errno == EINTR);
        if (n != (ssize_t)sizeof(code))
                return 0;
        return err_set(-code, "%s: cannot start %s: %s", c->o.name, c->o.argv[0], strerror(code));
}

static int start(struct child *c, const int in[2], const int out[2], const int fail[2])
{
        pid_t parent = getpid();

        c->pid = fork();
        if (c->pid == 0) {
                become(&c->o, in[0], out[1], parent);
                if (write(fail[1], &errno, sizeof(errno)) < 0)
                        _exit(126);
                _exit(127);
        }
        return c->pid < 0 ? err_set(-errno, "%s: cannot fork: %s", c->o.name, strerror(errno)) : 0;
}

static void close_pair(const int fd[2])
{
        for (int i = 0; i < 2; i++)
                if (fd[i] >= 0)
                        close(fd[i]);
}

static int start_with_pipes(struct child *c)
{
        int in[2] = {-1, -1}, out[2] = {-1, -1}, fail[2] = {-1, -1}, rc = 0;

        if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(fail, O_CLOEXEC) < 0)
                rc = err_set(-errno, "%s: cannot make pipes: %s", c->o.name, strerror(errno));
        if (rc == 0)
                rc = start(c, in, out, fail);
        if (rc == 0) {
                c->in = in[1], in[1] = -1;
                c->out = out[0], out[0] = -1;
                close(fail[1]), fail[1] = -1;
                rc = await_exec(c, fail[0]);
        }
        close_pair(in);
        close_pair(out);
        close_pair(fail);
        return rc;
}

/* Only our ends: what the child's are is its own choice. */
static int prepare_ends(struct child *c)
{
        c->pidfd = pidfd_open(c->pid, 0);
        if (c->pidfd < 0)
                return err_set(-errno, "%s: cannot watch the process: %s", c->o.name, strerror(errno));
        if (fcntl(c->in, F_SETFL, O_NONBLOCK) < 0 || fcntl(c->out, F_SETFL, O_NONBLOCK) < 0)
                return err_set(-errno, "%s: cannot set up pipes: %s", c->o.name, strerror(errno));
        return 0;
}

int child_start(const struct child_opts *opts, struct child **out)
{
        struct child *c = calloc(1, sizeof(*c));
        int rc;

        *out = NULL;
        if (!c)
                return err_set(-ENOMEM, "%s: no memory", opts->name);
        c->o = *opts;
        c->o.line_max = opts->line_max ? opts->line_max : CHILD_LINE_MAX;
        c->in = c->out = c->pidfd = -1;
        signal(SIGPIPE, SIG_IGN); /* its death must end a row, not us */
        rc = start_with_pipes(c);
        if (rc == 0)
                rc = prepare_ends(c);
        if (rc < 0) {
                child_end(c, 0);
                return rc;
        }
        *out = c;
        return 0;
}

/* ---- ending ---- */

static void describe(struct child *c, int status)
{
        if (WIFSIGNALED(status))
                snprintf(c->how, sizeof(c->how), "killed by signal %d (%s)", WTERMSIG(status),
                         strsignal(WTERMSIG(status)));
        else
                snprintf(c->how, sizeof(c->how), "exit status %d", WEXITSTATUS(status));
}

static void close_end(int *fd)
{
        if (*fd >= 0)
                close(*fd);
        *fd = -1;
}

/* The group is killed while its leader still is a zombie at least: its number cannot be another's yet. */
static void bury(struct child *c)
{
        int status = 0;
        pid_t got;

        if (c->pid <= 0 || c->dead)
                return;
        kill(-c->pid, SIGKILL);
        kill(c->pid, SIGKILL);
        do
                got = waitpid(c->pid, &status, 0);
        while (got < 0 && errno == EINTR);
        if (got == c->pid)
                describe(c, status);
        c->dead = true;
        close_end(&c->in);
        close_end(&c->out);
        close_end(&c->pidfd);
}

/* Whether it ended by itself before the deadline; it is not reaped. `stop` does not cut this short: it is short. */
static bool ended(const struct child *c, uint64_t deadline)
{
        struct pollfd p = {.fd = c->pidfd, .events = POLLIN};

        for (;;) {
                uint64_t now = clock_ns();
                int n = poll(&p, 1, now < deadline ? (int)((deadline - now) / 1000000) + 1 : 0);

                if (n > 0)
                        return true;
                if ((n < 0 && errno != EINTR) || now >= deadline)
                        return false;
        }
}

void child_kill(struct child *c)
{
        bury(c);
}

bool child_dead(const struct child *c)
{
        return c->dead;
}

void child_end(struct child *c, uint64_t patience_ns)
{
        if (!c)
                return;
        close_end(&c->in);
        if (!c->dead && patience_ns && c->pidfd >= 0)
                (void)ended(c, clock_ns() + patience_ns);
        bury(c);
        close_end(&c->in);
        close_end(&c->out);
        close_end(&c->pidfd);
        free(c->buf);
        free(c);
}

/* ---- asking ---- */

/* It closed one of its ends, most often by dying. */
static int gone(struct child *c, const char *what)
{
        bool by_itself = ended(c, clock_ns() + LAST_WORD_NS);

        bury(c);
        if (by_itself)
                return err_set(-EPIPE, "%s: the program ended: %s", c->o.name, c->how);
        return err_set(-EPIPE, "%s: the program closed its standard %s and went on; it was killed", c->o.name, what);
}

/* Its last words may come together with its end, so the end counts only where there are none. */
static bool silent_and_dead(const struct child *c, int fd, short events)
{
        struct pollfd p = {.fd = fd, .events = events};

        return ended(c, 0) && poll(&p, 1, 0) == 0;
}

static int wait_for(struct child *c, int fd, short events, uint64_t deadline)
{
        struct pollfd p[] = {{.fd = fd, .events = events}, {.fd = c->pidfd, .events = POLLIN}};

        for (;;) {
                uint64_t now = clock_ns(), left = now < deadline ? (deadline - now) / 1000000 + 1 : 0;
                int n = poll(p, 2, left < SLICE_MS ? (int)left : SLICE_MS);

                if (n > 0 && p[0].revents)
                        return 0;
                if (n > 0 && silent_and_dead(c, fd, events))
                        return gone(c, fd == c->in ? "input" : "output");
                if (c->o.stop && *c->o.stop)
                        return err_set(-EINTR, "interrupted");
                if (n < 0 && errno != EINTR)
                        return err_set(-errno, "%s: poll: %s", c->o.name, strerror(errno));
                if (now >= deadline)
                        return -ETIME;
        }
}

static int put(struct child *c, const char *text, size_t len, uint64_t deadline)
{
        int rc = 0;

        while (len && rc == 0) {
                ssize_t n = write(c->in, text, len);

                if (n > 0)
                        text += n, len -= (size_t)n;
                else if (n < 0 && errno == EPIPE)
                        rc = gone(c, "input");
                else if (n < 0 && errno == EAGAIN)
                        rc = wait_for(c, c->in, POLLOUT, deadline);
                else if (n < 0 && errno != EINTR)
                        rc = err_set(-errno, "%s: cannot write to the program: %s", c->o.name, strerror(errno));
        }
        return rc;
}

static int make_room(struct child *c)
{
        size_t cap = c->cap ? c->cap * 2 : BUF_FIRST;
        char *grown;

        if (c->len < c->cap)
                return 0;
        if (c->cap >= c->o.line_max)
                return err_set(-EFBIG, "%s: an answer of more than %zu bytes", c->o.name, c->o.line_max);
        cap = cap > c->o.line_max ? c->o.line_max : cap;
        grown = realloc(c->buf, cap);
        if (!grown)
                return err_set(-ENOMEM, "%s: no memory for an answer", c->o.name);
        c->buf = grown;
        c->cap = cap;
        return 0;
}

/* Until the newline is there; *line: bytes before it. */
static int get(struct child *c, uint64_t deadline, size_t *line)
{
        int rc = 0;

        c->len = 0;
        while (rc == 0) {
                ssize_t n;
                char *end;

                rc = make_room(c);
                if (rc < 0)
                        break;
                n = read(c->out, c->buf + c->len, c->cap - c->len);
                if (n == 0)
                        return gone(c, "output");
                if (n < 0) {
                        if (errno == EAGAIN)
                                rc = wait_for(c, c->out, POLLIN, deadline);
                        else if (errno != EINTR)
                                rc =
                                    err_set(-errno, "%s: cannot read from the program: %s", c->o.name, strerror(errno));
                        continue;
                }
                end = memchr(c->buf + c->len, '\n', (size_t)n);
                c->len += (size_t)n;
                if (end) {
                        *line = (size_t)(end - c->buf);
                        return 0;
                }
        }
        return rc;
}

/* An answer that is there before the question would have been free of charge. */
static int expect_silence(struct child *c)
{
        char some[64];
        ssize_t n = read(c->out, some, sizeof(some));

        if (n <= 0)
                return 0; /* an end is noticed when the answer is awaited */
        return err_set(-EPROTO,
                       "%s: the program wrote to its standard output without being asked; that is for answers, "
                       "anything else belongs on standard error",
                       c->o.name);
}

#define WANTED "expected one JSON object in a line and nothing else on standard output"

static int understand(struct child *c, size_t line, json **answer)
{
        char name[96];

        if (c->len > line + 1)
                return err_set(-EPROTO, "%s: the program answered with more than one line; " WANTED, c->o.name);
        snprintf(name, sizeof(name), "%.64s: its answer", c->o.name);
        *answer = json_parse(c->buf, line, name);
        if (!*answer)
                return err_trail(-EPROTO, WANTED);
        if (json_is_object(*answer))
                return 0;
        json_free(*answer);
        *answer = NULL;
        return err_set(-EPROTO, "%s: no object; " WANTED, name);
}

static int in_time(const struct child *c, int rc, uint64_t timeout_ns)
{
        if (rc != -ETIME)
                return rc;
        return err_set(-ETIMEDOUT, "%s: no answer within %.1f s", c->o.name, (double)timeout_ns / NS_PER_S);
}

static int exchange(struct child *c, const char *text, size_t len, uint64_t timeout_ns, size_t *line, uint64_t *wall_ns)
{
        uint64_t start = clock_ns();
        int rc = put(c, text, len, start + timeout_ns);

        if (rc == 0)
                rc = get(c, start + timeout_ns, line);
        if (rc == 0 && wall_ns)
                *wall_ns = clock_ns() - start;
        return in_time(c, rc, timeout_ns);
}

/* The message as a line; *len with its newline, which takes the place of the NUL. free() it. */
static char *line_of(const json *message, size_t *len)
{
        char *text = json_text(message, false);

        *len = strlen(text) + 1;
        text[*len - 1] = '\n';
        return text;
}

static int refuse_dead(const struct child *c)
{
        return err_set(-EPIPE, "%s: the program ended: %s", c->o.name, c->how);
}

int child_ask(struct child *c, const json *question, uint64_t timeout_ns, json **answer, uint64_t *wall_ns)
{
        size_t line = 0, len;
        char *text;
        int rc;

        *answer = NULL;
        if (c->dead)
                return refuse_dead(c);
        text = line_of(question, &len);
        rc = expect_silence(c);
        if (rc == 0)
                rc = exchange(c, text, len, timeout_ns, &line, wall_ns);
        if (rc == 0)
                rc = understand(c, line, answer);
        free(text);
        if (rc < 0)
                bury(c);
        return rc;
}

int child_tell(struct child *c, const json *message, uint64_t timeout_ns)
{
        size_t len;
        char *text;
        int rc;

        if (c->dead)
                return refuse_dead(c);
        text = line_of(message, &len);
        rc = in_time(c, put(c, text, len, clock_ns() + timeout_ns), timeout_ns);
        free(text);
        if (rc < 0)
                bury(c);
        return rc;
}
