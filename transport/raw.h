/*
 * The medium itself: the same message pattern as a request, by the fewest instructions that the medium allows, with the
 * same number of processes. What a transport costs beyond this is its own doing. Used by `perf --raw` and for the
 * column wire_floor_ms.
 *   shm: one writer and one reader per direction over bare cache lines of a shared mapping (payload copied in, flag
 *        line stored with release order, read in place);
 *   tcp: bare non-blocking sockets, TCP_NODELAY, one send(2) and as many recv(2) as it takes.
 */
#ifndef DJINN_TRANSPORT_RAW_H
#define DJINN_TRANSPORT_RAW_H

#include <stddef.h>
#include <stdint.h>

struct raw_pair;

/* Starts a child process that answers; cpu_peer: core to pin it to, -1 none. scheme "shm" or "tcp" (loopback), else
 * -ENOTSUP. max_bytes: the largest message either way. */
int raw_open(const char *scheme, size_t max_bytes, int cpu_peer, struct raw_pair **out);
/* One exchange: up bytes there (from src), then down bytes back (into dst, NULL: stay where they arrive). Returns the
 * round trip in ns, or -errno when the child died. For sizes up to max_bytes. */
int64_t raw_exchange(struct raw_pair *p, const void *src, size_t up, void *dst, size_t down);
/* Writes n messages of size bytes as a stream with up to depth unacknowledged, and waits until the child has confirmed
 * all; ns, or -errno. */
int64_t raw_stream(struct raw_pair *p, const void *src, size_t size, uint64_t n, unsigned depth);
void raw_close(struct raw_pair *p);

#endif
