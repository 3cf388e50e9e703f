/* Files: read whole, make folders, resolve beneath a root. */
#ifndef DJINN_BASE_FILES_H
#define DJINN_BASE_FILES_H

#include <stddef.h>

/* Reads at most max bytes; a larger file is -EFBIG with a sentence. *out is NUL-terminated; free() it. */
int file_read(const char *path, size_t max, char **out, size_t *len);
/* mkdir -p. */
int file_mkdirs(const char *path);
/* openat2(RESOLVE_BENEATH): opens `name` under the folder root_fd, refusing .., absolute paths and links that leave
 * the root. follow_out: a link may lead out of the folder (hub caches link snapshots/ to blobs/) as long as it stays
 * beneath root_fd. Returns fd or -errno with a sentence. */
int file_open_beneath(int root_fd, const char *name, int flags);
int file_read_fd(int fd, const char *name, size_t max, char **out, size_t *len);

#endif
