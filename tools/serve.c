/* serve: the server as a process of its own. */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "injure.h"
#include "server.h"
#include "tools.h"
#include "transport.h"

struct serve_opts {
        struct opt_list listen, model_root;
        const char *device, *key_file, *ready_file, *host;
        int64_t threads, port, gpu, cpu;
        uint64_t memory, spin_ns;
        bool insecure, once;
};

#define AT(field) .offset = offsetof(struct serve_opts, field)

static const struct opt serve_options[] = {
    {"listen", .metavar = "URL", .type = OPT_LIST, AT(listen),
     .help = "where to listen, one URL per transport: tcp://host:port, shm://name; a port of 0 is chosen by the "
             "kernel. Default tcp://127.0.0.1:5556"},
    {"device", .metavar = "D", .type = OPT_STR, AT(device), .help = "device to run on, default cpu (see list)"},
    {"threads", .metavar = "N", .type = OPT_INT, AT(threads), .max = 1024,
     .help = "threads of the engine; 0: all cores but one"},
    {"model-root", .metavar = "DIR", .type = OPT_LIST, AT(model_root),
     .help = "folders with models, looked at before DJINN_MODEL_PATH and the Hugging Face caches"},
    {"key-file", .metavar = "FILE", .type = OPT_STR, AT(key_file),
     .help = "key that every client must prove; default $DJINN_KEY_FILE"},
    {"insecure", .type = OPT_FLAG, AT(insecure), .help = "off loopback without a key, for clients that say the same"},
    {"ready-file", .metavar = "FILE", .type = OPT_STR, AT(ready_file),
     .help = "written when all listeners are up, one URL per line"},
    {"once", .type = OPT_FLAG, AT(once), .help = "end when the first client has gone"},
    {"cpu", .metavar = "N", .type = OPT_INT, AT(cpu), .max = 4095, .min = -1,
     .help = "pin the polling thread to this CPU; without it or with -1 it is not pinned"},
    {"memory", .metavar = "SIZE", .type = OPT_SIZE, AT(memory),
     .help = "limit of what one session may hold; default a quarter of the host's"},
    {"spin", .metavar = "TIME", .type = OPT_DURATION, AT(spin_ns),
     .help = "poll for so long after the last activity before sleeping; default 5ms"},
    {"host", .metavar = "H", .type = OPT_STR, AT(host), .help = "with --port: the same as --listen tcp://H:P"},
    {"port", .metavar = "P", .type = OPT_INT, AT(port), .min = -1, .max = 65535,
     .help = "with --host, which is 127.0.0.1 if not given: the same as --listen tcp://H:P; default 5556"},
    {"gpu", .metavar = "N", .type = OPT_INT, AT(gpu), .min = -1, .max = 255, .help = "the same as --device cuda:N"},
};

const struct opts_spec serve_spec = {
    .name = "djinnbench serve",
    .usage = "[--listen URL...] [options]",
    .about =
        "Serves graphs on one device to sweeps of this and other hosts, on all listeners from one thread, until it "
        "is interrupted. Off loopback both sides need the same key, or must both say --insecure; a key "
        "authenticates and does not encrypt. Exit status 3 when a listener or the device cannot be had.",
    .table = serve_options,
    .count = ARRAY_LEN(serve_options),
};

static volatile sig_atomic_t stopped;

static void on_signal(int sig)
{
        stopped = 1;
}

static void catch_signals(void)
{
        struct sigaction sa = {.sa_handler = on_signal};

        sigaction(SIGINT, &sa, NULL);
        sigaction(SIGTERM, &sa, NULL);
        signal(SIGPIPE, SIG_IGN);
}

/* --host and --port, and the default, as one more URL. */
static int host_and_port(const struct serve_opts *o, char *url, size_t len)
{
        const char *host = o->host ? o->host : "127.0.0.1";
        int port = o->port >= 0 ? (int)o->port : 5556;
        bool v6 = strchr(host, ':') != NULL;

        if (!o->host && o->port < 0 && o->listen.count > 0)
                return 0;
        if (snprintf(url, len, v6 ? "tcp://[%s]:%d" : "tcp://%s:%d", host, port) >= (int)len)
                return err_set(-EINVAL, "--host: longer than any name of a host");
        return 1;
}

/* A listener that could only refuse everybody is a mistake, said now and not to each client. */
static int check_exposure(const struct server_opts *so)
{
        for (size_t i = 0; i < so->nurls; i++) {
                struct tp_url u;
                int rc = tp_url_parse(so->urls[i], &u);

                if (rc < 0)
                        return rc;
                if (!u.loopback && !so->key.present && !so->insecure)
                        return err_set(-EACCES,
                                       "%s can be reached from other hosts: give --key-file, or --insecure to go "
                                       "without",
                                       so->urls[i]);
        }
        return 0;
}

static int load_key(const struct serve_opts *o, struct auth_key *out)
{
        const char *path = o->key_file ? o->key_file : getenv("DJINN_KEY_FILE");

        return path && *path ? key_load(path, out) : 0;
}

static int prepare(const struct serve_opts *o, struct server_opts *so, const char **urls, char *extra, size_t extra_len,
                   char *device, size_t device_len)
{
        int rc = host_and_port(o, extra, extra_len);

        if (rc < 0)
                return rc;
        if (o->listen.count > 0)
                memcpy(urls, o->listen.at, o->listen.count * sizeof(*urls));
        so->nurls = o->listen.count;
        if (rc > 0)
                urls[so->nurls++] = extra;
        snprintf(device, device_len, "cuda:%d", (int)o->gpu);
        so->device = o->device ? o->device : o->gpu >= 0 ? device : "cpu";
        rc = load_key(o, &so->key);
        if (rc >= 0)
                rc = check_exposure(so);
        return rc < 0 ? rc : injure_init();
}

static int serve(const struct serve_opts *o)
{
        const char **urls = calloc(o->listen.count + 1, sizeof(*urls));
        struct server_opts so = {.urls = urls,
                                 .threads = (int)o->threads,
                                 .model_roots = o->model_root.at,
                                 .nmodel_roots = o->model_root.count,
                                 .insecure = o->insecure,
                                 .once = o->once,
                                 .ready_file = o->ready_file,
                                 .ready_fd = -1,
                                 .stop = &stopped,
                                 .cpu = (int)o->cpu,
                                 .memory_bytes = o->memory,
                                 .spin_ns = o->spin_ns};
        char extra[TP_URL_MAX], device[16];
        int rc, status = EXIT_DONE;

        if (!urls)
                return command_fail(&serve_spec, -ENOMEM, EXIT_ENVIRONMENT);
        rc = prepare(o, &so, urls, extra, sizeof(extra), device, sizeof(device));
        if (rc < 0) {
                status = command_fail(&serve_spec, rc, EXIT_USAGE);
        } else {
                catch_signals();
                rc = server_run(&so);
                if (rc < 0)
                        status = command_fail(&serve_spec, rc, EXIT_ENVIRONMENT);
        }
        free(urls);
        return status;
}

int serve_main(int argc, char **argv)
{
        struct serve_opts o = {.cpu = -1, .port = -1, .gpu = -1};
        struct opts_parsed parsed;
        int status = command_parse(&serve_spec, argc, argv, &o, &parsed);

        if (status == COMMAND_GO_ON)
                status = serve(&o);
        opts_free(&serve_spec, &o, &parsed);
        return status;
}
