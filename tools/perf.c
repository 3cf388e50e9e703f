/* perf: the transports alone. The command and its options. */
#include <errno.h>

#include "err.h"
#include "clock.h"
#include "perf_inside.h"
#include "tools.h"

static const struct opt perf_options[] = {
    {"transport", .metavar = "T", .type = OPT_STR, .offset = offsetof(struct perf_opts, transport),
     .help = "shm, tcp, loop, ...; default: the best one here"},
    {"op", .metavar = "OP", .type = OPT_CHOICE, .offset = offsetof(struct perf_opts, op), .choices = perf_op_names,
     .preset = "auto", .help = "send, write, write_imm, read"},
    {"sizes", .metavar = "LIST", .type = OPT_STR, .offset = offsetof(struct perf_opts, sizes_text),
     .preset = "64,4K,1M", .help = "1..4M:x2, 64..512:+64; mixed: 1..64K:log"},
    {"mem", .metavar = "M", .type = OPT_STR, .offset = offsetof(struct perf_opts, mem), .preset = "host",
     .help = "host or cuda:N"},
    {"gpu-path", .metavar = "P", .type = OPT_CHOICE, .offset = offsetof(struct perf_opts, gpu_path),
     .choices = tp_gpu_path_names, .preset = "auto", .help = "auto, or force:X"},
    {"duration", .metavar = "TIME", .type = OPT_DURATION, .offset = offsetof(struct perf_opts, duration_ns), .min = 1e6,
     .max = 8.64e13, .preset = "500ms", .help = "of one repeat of one size"},
    {"iters", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, iters), .min = 1, .max = 1e12,
     .help = "transfers in a repeat, instead of a duration"},
    {"forever", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, forever),
     .help = "until stopped, with a line per second"},
    {"warmup", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, warmup), .max = 1e9,
     .help = "transfers; default: 1/10 duration, none with --iters"},
    {"repeats", .metavar = "K", .type = OPT_INT, .offset = offsetof(struct perf_opts, repeats), .min = 1,
     .max = PERF_REPEATS_MAX, .preset = "3", .help = "of each size, both ends restarted"},
    {"depth", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, depth), .min = 1,
     .max = PERF_DEPTH_MAX, .preset = "16", .help = "transfers in flight"},
    {"connections", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, connections), .min = 1,
     .max = PERF_CONNS_MAX, .preset = "1", .help = "in all"},
    {"threads", .metavar = "N", .type = OPT_INT, .offset = offsetof(struct perf_opts, threads), .min = 1,
     .max = PERF_THREADS_MAX, .preset = "1", .help = "at each end, sharing the connections"},
    {"bidirectional", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, bidirectional),
     .help = "bw, rate: both ends send"},
    {"rate", .metavar = "R", .type = OPT_NUM, .offset = offsetof(struct perf_opts, rate), .min = 1, .max = 1e9,
     .help = "lat: open loop, R requests per second in all"},
    {"arrivals", .metavar = "A", .type = OPT_CHOICE, .offset = offsetof(struct perf_opts, arrivals),
     .choices = perf_arrival_names, .preset = "poisson", .help = "poisson or constant"},
    {"raw", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, raw), .help = "the bare medium beside it, in turn"},
    {"verify", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, verify),
     .help = "fill and check every byte; costs time"},
    {"stall", .metavar = "TIME", .type = OPT_DURATION, .offset = offsetof(struct perf_opts, stall_ns), .min = 1e8,
     .max = 3.6e12, .preset = "10s", .help = "nothing moves for so long: an error"},
    {"cpus", .metavar = "LIST", .type = OPT_STR, .offset = offsetof(struct perf_opts, cpus),
     .help = "cores of this end, then of the other: 0,1"},
    {"json", .metavar = "FILE", .type = OPT_STR, .offset = offsetof(struct perf_opts, json),
     .help = "write the results there (djinnbench.perf/1)"},
    {"listen", .metavar = "URL", .type = OPT_STR, .offset = offsetof(struct perf_opts, listen),
     .help = "be the other end; what is given must agree"},
    {"once", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, once),
     .help = "--listen: end after the first driver"},
    {"connect", .metavar = "URL", .type = OPT_STR, .offset = offsetof(struct perf_opts, connect),
     .help = "measure against a perf --listen"},
    {"wait", .metavar = "S", .type = OPT_INT, .offset = offsetof(struct perf_opts, wait_s), .max = 86400,
     .help = "--connect: try for S seconds"},
    {"key-file", .metavar = "FILE", .type = OPT_STR, .offset = offsetof(struct perf_opts, key_file),
     .help = "needed off this host (or DJINN_KEY_FILE)"},
    {"insecure", .type = OPT_FLAG, .offset = offsetof(struct perf_opts, insecure),
     .help = "go without a key off this host"},
};

const struct opts_spec perf_spec = {
    .name = "djinnbench perf",
    .usage = "[lat|bw|rate] [--transport T] [options]",
    .about = "Measures a transport alone: lat, half of a round trip; bw, bandwidth confirmed by the receiver; rate, "
             "messages per second. Starts both ends here, on cores of their own, unless told to listen or to "
             "connect.",
    .table = perf_options,
    .count = sizeof(perf_options) / sizeof(perf_options[0]),
    .args_max = 1,
    .args_what = "one of lat, bw, rate",
};

int perf_main(int argc, char **argv)
{
        static struct perf_opts o = {.warmup = -1};
        struct opts_parsed parsed;
        int status = command_parse(&perf_spec, argc, argv, &o, &parsed), rc;

        clock_stamp_init(); /* before any process or thread of a launch begins */
        if (status == COMMAND_GO_ON) {
                rc = perf_opts_refine(&o, &parsed);
                status = rc < 0 ? command_fail(&perf_spec, rc, rc == -ENOTSUP ? EXIT_ENVIRONMENT : EXIT_USAGE)
                                : perf_run(&o);
        }
        opts_free(&perf_spec, &o, &parsed);
        return status;
}
