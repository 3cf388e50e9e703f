#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "check.h"
#include "err.h"

#define READ_START_BYTES 4096
#define OPEN_TRIES       100

/* read(2) until `want` bytes or the end; the count, or -errno. */
static ssize_t read_full(int fd, char *buf, size_t want)
{
        size_t got = 0;

        while (got < want) {
                ssize_t n = read(fd, buf + got, want - got);

                if (n == 0)
                        break;
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return -errno;
                got += (size_t)n;
        }
        return (ssize_t)got;
}

/* What fstat says is only a hint (pipes, /proc): the buffer grows until the end of the file or until one byte above
 * max has been seen. */
static size_t first_guess(int fd, size_t max)
{
        struct stat st;
        size_t guess = READ_START_BYTES;

        if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0)
                guess = (size_t)st.st_size + 1;
        return guess < max + 1 ? guess : max + 1;
}

int file_read_fd(int fd, const char *name, size_t max, char **out, size_t *len)
{
        BUG_ON(max >= SIZE_MAX / 4);
        size_t room = first_guess(fd, max), have = 0;
        char *buf = NULL;

        for (;;) {
                char *bigger = realloc(buf, room + 1);

                if (!bigger) {
                        free(buf);
                        return err_set(-ENOMEM, "%s: no memory for %zu bytes", name, room);
                }
                buf = bigger;
                ssize_t n = read_full(fd, buf + have, room - have);

                if (n < 0) {
                        free(buf);
                        return err_set((int)n, "%s: cannot read: %s", name, strerror((int)-n));
                }
                have += (size_t)n;
                if (have < room || room == max + 1)
                        break;
                room = room < (max + 1) / 2 ? room * 2 : max + 1;
        }
        if (have > max) {
                free(buf);
                return err_set(-EFBIG, "%s: larger than the limit of %zu bytes", name, max);
        }
        buf[have] = '\0';
        *out = buf;
        *len = have;
        return 0;
}

int file_read(const char *path, size_t max, char **out, size_t *len)
{
        int fd = open(path, O_RDONLY | O_CLOEXEC);

        if (fd < 0)
                return err_set(-errno, "%s: cannot open: %s", path, strerror(errno));
        int rc = file_read_fd(fd, path, max, out, len);

        close(fd);
        return rc;
}

static int make_one(const char *path)
{
        struct stat st;

        if (mkdir(path, 0777) == 0)
                return 0;
        if (errno != EEXIST)
                return err_set(-errno, "%s: cannot make this folder: %s", path, strerror(errno));
        if (stat(path, &st) < 0 || !S_ISDIR(st.st_mode))
                return err_set(-ENOTDIR, "%s: cannot make this folder: something else has that name", path);
        return 0;
}

int file_mkdirs(const char *path)
{
        char *copy = strdup(path);
        int rc = 0;

        if (!copy)
                return err_set(-ENOMEM, "%s: no memory", path);
        if (!*path)
                rc = err_set(-ENOENT, "cannot make a folder without a name");
        for (char *p = copy + 1; rc == 0 && *copy && *p; p++) {
                if (*p != '/' || p[-1] == '/')
                        continue;
                *p = '\0';
                rc = make_one(copy);
                *p = '/';
        }
        if (rc == 0)
                rc = make_one(copy);
        free(copy);
        return rc;
}

static int explain(int err, const char *name)
{
        if (err == EXDEV)
                return err_set(-err, "%s: leads out of its root folder", name);
        if (err == ENOSYS || err == EPERM)
                return err_set(-err,
                               "%s: cannot be opened safely: openat2 is missing (Linux 5.6 or newer is needed) "
                               "or forbidden here",
                               name);
        return err_set(-err, "%s: cannot open: %s", name, strerror(err));
}

int file_open_beneath(int root_fd, const char *name, int flags)
{
        /* O_NONBLOCK: a FIFO planted under the root must not hang us; it is refused below. */
        struct open_how how = {
            .flags = (uint64_t)(flags | O_CLOEXEC | O_NONBLOCK),
            .mode = flags & O_CREAT ? 0666 : 0,
            .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS,
        };
        struct stat st;

        if (flags & O_PATH)
                how.flags &= ~(uint64_t)O_NONBLOCK;
        int fd = -1, tries = 0;

        /* The kernel answers EAGAIN when something was renamed while it resolved "..". */
        do {
                fd = (int)syscall(SYS_openat2, root_fd, name, &how, sizeof(how));
        } while (fd < 0 && (errno == EAGAIN || errno == EINTR) && ++tries < OPEN_TRIES);
        if (fd < 0)
                return explain(errno, name);
        if (fstat(fd, &st) < 0 || !(S_ISREG(st.st_mode) || S_ISDIR(st.st_mode))) {
                close(fd);
                return err_set(-EINVAL, "%s: neither a file nor a folder", name);
        }
        return fd;
}
