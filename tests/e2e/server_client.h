/*
 * A server in a thread of its own and the smallest client that can speak to it, for test_server_*.c. Everything fails
 * the test where it goes wrong; what is expected to be refused is asked for with cl_try().
 */
#ifndef DJINN_TESTS_SERVER_CLIENT_H
#define DJINN_TESTS_SERVER_CLIENT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "protocol.h"
#include "server.h"
#include "transport.h"

/* ---- server ---- */

struct test_server;
/* opts: urls, stop and ready_fd are filled in here. NULL: defaults. Listens on tcp, shm and loop. */
struct test_server *ts_start(const struct server_opts *opts);
/* The URL of its listener with this scheme. */
const char *ts_url(const struct test_server *s, const char *scheme);
/* Ends it and returns what server_run returned. */
int ts_stop(struct test_server *s);

/* ---- client ---- */

struct client {
        struct tp_ctx *ctx;
        struct tp_ep *ep;
        struct tp_attr attr;
        struct msg_auth_reply server;
        uint64_t next_id;
        uint8_t *frame, *inbox; /* attr.msg_max each */
        size_t inbox_len;
        bool down;
        int error; /* of the last ERROR: code, phase, field, flags, sentence */
        unsigned phase, field, error_flags;
        char text[256];
        struct tp_mem *region; /* given as region 0 */
        uint8_t *bytes;        /* of it */
        struct tp_rmem *staging, *shadow;
};

void cl_connect(struct client *c, const char *url);
/* HELLO and AUTH; 0, or the code of the refusal. */
int cl_hello(struct client *c, const struct auth_key *key, uint32_t flags);
int cl_auth(struct client *c, const struct auth_key *key);
/* All three, without a key. */
void cl_open(struct client *c, const char *url);
void cl_close(struct client *c);  /* with BYE */
void cl_vanish(struct client *c); /* without */

/* Sends a frame whose header is made here; its request id. */
uint64_t cl_send(struct client *c, void *frame, size_t len, enum msg_opcode op, uint32_t flags);
/* Next message into inbox, passing over CREDIT: its opcode, 0 the connection is down. Fails after 20 s. */
unsigned cl_next(struct client *c);
/* The answer to this id: 0 and it is in inbox, or the code of an ERROR (-ECONNRESET: down). */
int cl_answer(struct client *c, enum msg_opcode op, uint64_t id);
int cl_try(struct client *c, void *frame, size_t len, enum msg_opcode op, enum msg_opcode answer);

int cl_load(struct client *c, const struct graph *g, enum msg_weights weights, uint64_t seed, const char *id,
            struct msg_loaded *out);
void cl_region(struct client *c, size_t len);
int cl_ask(struct client *c, enum msg_keys_kind kind, uint32_t model, uint32_t index, size_t len, struct tp_rmem **out);
void cl_write(struct client *c, const void *src, size_t len, struct tp_rmem *to, uint64_t off);

/* A RUN under construction. */
struct cl_run {
        struct msg_run run;
        struct run_range ranges[RUN_RANGES_MAX];
        struct run_feedback feedback[RUN_FEEDBACK_MAX];
        struct run_input inputs[8];
        struct run_output outputs[8];
        uint8_t bytes[4096];
};

void run_range(struct cl_run *r, uint32_t first, uint32_t count, uint32_t rows, uint32_t repeat, uint32_t feedback);
void run_inline(struct cl_run *r, uint32_t tensor, const void *data, size_t len);
void run_written(struct cl_run *r, uint32_t tensor, size_t len);
void run_output(struct cl_run *r, uint32_t tensor, uint32_t flags, size_t len, uint64_t region_off, uint32_t step);
uint64_t cl_run_send(struct client *c, const struct cl_run *r);
/* 0 and the DONE, or the code of the ERROR. */
int cl_run(struct client *c, const struct cl_run *r, struct msg_done *done);

/* An echo graph of this many bytes; a GPT-2 with random weights, 2 layers of width 16, 61 words, 64 positions. */
void graph_echo(struct graph *out, size_t bytes);
void graph_tiny(struct graph *out, uint32_t rows_max);

#endif
