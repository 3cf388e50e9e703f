#include "injure.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"

#define DELAY_MAX_US   60000000ull
#define PAYLOAD_MAX    (1ull << 30)
#define CLOCK_MAX_PPM  10000ull
#define ITEM_MAX_BYTES 64

const char *const leaf_keys[LEAF_COUNT] = {
    [LEAF_CLIENT_SERIALIZE] = "client_serialize_ms", [LEAF_NETWORK_C2S] = "client_network_c2s_ms",
    [LEAF_SERVER_QUEUE] = "server_queue_latency_ms", [LEAF_SERVER_PLAN] = "server_plan_ms",
    [LEAF_SERVER_PLACEMENT] = "server_placement_ms", [LEAF_SERVER_LAUNCH] = "server_launch_ms",
    [LEAF_SERVER_EXECUTION] = "server_execution_ms", [LEAF_SERVER_SKELETONIZATION] = "server_skeletonization_ms",
    [LEAF_NETWORK_S2C] = "client_network_s2c_ms",    [LEAF_CLIENT_DESERIALIZE] = "client_deserialize_ms",
    [LEAF_CLIENT_STEP] = "client_step_ms",
};

struct injury injury;

static int leaf_find(const char *name, size_t len)
{
        for (int i = 0; i < LEAF_COUNT; i++)
                if (strlen(leaf_keys[i]) == len + strlen("_ms") && strncmp(leaf_keys[i], name, len) == 0)
                        return i;
        return -1;
}

/* Digits only, 1 to max. */
static int parse_count(const char *item, const char *digits, uint64_t max, uint64_t *out)
{
        char *end;

        errno = 0;
        unsigned long long v = strtoull(digits, &end, 10);

        if (digits[0] < '0' || digits[0] > '9' || *end || errno || v == 0 || v > max)
                return err_set(-EINVAL, "DJINN_INJURE: '%s': expected a number from 1 to %llu after '='", item,
                               (unsigned long long)max);
        *out = v;
        return 0;
}

static int parse_delay(struct injury *into, const char *item)
{
        const char *leaf = item + strlen("delay:"), *eq = strchr(leaf, '=');
        uint64_t us = 0;

        if (!eq)
                return err_set(-EINVAL, "DJINN_INJURE: '%s': expected delay:<leaf>=<microseconds>", item);
        int which = leaf_find(leaf, (size_t)(eq - leaf));

        if (which < 0)
                return err_set(-EINVAL, "DJINN_INJURE: '%s': no such leaf; a leaf is, for example, server_execution",
                               item);
        int rc = parse_count(item, eq + 1, DELAY_MAX_US, &us);

        if (rc == 0)
                into->delay_ns[which] = us * NS_PER_US;
        return rc;
}

static int parse_item(struct injury *into, const char *item)
{
        if (strncmp(item, "delay:", strlen("delay:")) == 0)
                return parse_delay(into, item);
        if (strncmp(item, "payload=", strlen("payload=")) == 0)
                return parse_count(item, item + strlen("payload="), PAYLOAD_MAX, &into->payload_bytes);
        if (strncmp(item, "server_clock=", strlen("server_clock=")) == 0)
                return parse_count(item, item + strlen("server_clock="), CLOCK_MAX_PPM, &into->server_clock_ppm);
        if (strcmp(item, "drop_state") == 0)
                into->drop_state = true;
        else if (strcmp(item, "trim_input") == 0)
                into->trim_input = true;
        else
                return err_set(-EINVAL,
                               "DJINN_INJURE: '%s' is none of delay:<leaf>=<us>, payload=<bytes>, "
                               "drop_state, trim_input, server_clock=<ppm>",
                               item);
        return 0;
}

int injure_init(void)
{
        const char *at = getenv("DJINN_INJURE");
        struct injury parsed = {.active = at && *at};
        char item[ITEM_MAX_BYTES];

        while (at && *at) {
                size_t len = strcspn(at, ",");

                if (len >= sizeof(item))
                        return err_set(-EINVAL, "DJINN_INJURE: item '%.20s...' is too long", at);
                memcpy(item, at, len);
                item[len] = '\0';
                int rc = parse_item(&parsed, item);

                if (rc < 0)
                        return rc;
                at += len;
                if (*at == ',' && *++at == '\0')
                        return err_set(-EINVAL, "DJINN_INJURE: nothing after the last comma");
        }
        injury = parsed;
        return 0;
}

uint64_t injure_clock(uint64_t ns)
{
        return ns + ns / 1000000 * injury.server_clock_ppm + ns % 1000000 * injury.server_clock_ppm / 1000000;
}

void injure_spin(uint64_t ns)
{
        clock_spin_until(clock_ns() + ns);
}
