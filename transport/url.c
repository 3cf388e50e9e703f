/*
 * URLs: scheme://host:port?a=1&b=2, scheme://[v6]:port, scheme://[fe80::1%eth0]:port, shm://name, loop://, and a bare
 * host:port, which means tcp.
 */
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>

#include "err.h"
#include "transport.h"

/* The scheme below wrappers: "fault+tcp" is carried by tcp. */
static const char *carrier(const char *scheme)
{
        const char *plus = strrchr(scheme, '+');

        return plus ? plus + 1 : scheme;
}

/* Schemes whose address is a name on this host and not a host and port. */
static bool is_local_name(const char *scheme)
{
        const char *c = carrier(scheme);

        return !strcmp(c, "shm") || !strcmp(c, "loop") || !strcmp(c, "null");
}

static int copy_part(const char *text, const char *what, char *dst, size_t size, const char *src, size_t len)
{
        if (len >= size)
                return err_set(-EINVAL, "%s: the %s has %zu characters, at most %zu are allowed", text, what, len,
                               size - 1);
        memcpy(dst, src, len);
        dst[len] = '\0';
        return 0;
}

static int check_chars(const char *text)
{
        if (strlen(text) >= TP_URL_MAX)
                return err_set(-EINVAL, "URL of %zu characters, at most %d are allowed", strlen(text), TP_URL_MAX - 1);
        for (const char *p = text; *p; p++)
                if (!isgraph((unsigned char)*p))
                        return err_set(-EINVAL, "URL: character 0x%02x at position %zu, expected none but printable",
                                       (unsigned char)*p, (size_t)(p - text));
        return 0;
}

static int parse_scheme(const char *text, struct tp_url *out, const char **rest)
{
        const char *sep = strstr(text, "://");
        const char *query = strchr(text, '?');
        int rc;

        if (!sep || (query && query < sep)) {
                strcpy(out->scheme, "tcp");
                *rest = text;
                return 0;
        }
        rc = copy_part(text, "scheme", out->scheme, sizeof(out->scheme), text, (size_t)(sep - text));
        if (rc < 0)
                return rc;
        for (const char *p = out->scheme; *p; p++)
                if (!islower((unsigned char)*p) && !isdigit((unsigned char)*p) && *p != '+')
                        return err_set(-EINVAL, "%s: the scheme before :// is made of a-z, 0-9 and +", text);
        if (out->scheme[0] == '\0')
                return err_set(-EINVAL, "%s: nothing before ://, expected a transport such as tcp or shm", text);
        *rest = sep + 3;
        return 0;
}

static int parse_port(const char *text, const char *p, size_t len, struct tp_url *out)
{
        size_t digits = 0;
        int rc;

        while (digits < len && isdigit((unsigned char)p[digits]))
                digits++;
        if (len == 0 || digits != len)
                return err_set(-EINVAL, "%s: the port '%.*s' is not a number", text, (int)len, p);
        rc = copy_part(text, "port", out->port, sizeof(out->port), p, len);
        if (rc < 0)
                return rc;
        if (strtoul(out->port, NULL, 10) > 65535)
                return err_set(-EINVAL, "%s: port %s, expected 0 to 65535", text, out->port);
        return 0;
}

/* A link-local address means nothing without the interface that it is on; no other one has that. */
static int check_v6(const char *text, const char *host)
{
        char bare[sizeof(((struct tp_url *)0)->host)];
        size_t len = strcspn(host, "%"), zone = host[len] ? strlen(host + len + 1) : 0;
        bool link_local;
        unsigned char a[16];

        snprintf(bare, sizeof(bare), "%.*s", (int)len, host);
        if (inet_pton(AF_INET6, bare, a) != 1)
                return err_set(-EINVAL, "%s: '%s' is not an IPv6 address", text, bare);
        link_local = a[0] == 0xfe && a[1] >> 6 == 2;
        if (link_local && !host[len])
                return err_set(-EINVAL, "%s: a link-local address needs the interface of this host: [%s%%eth0]", text,
                               bare);
        if (!link_local && host[len])
                return err_set(-EINVAL, "%s: %s is not link-local, so no interface follows it", text, bare);
        if (link_local && (zone == 0 || zone >= IF_NAMESIZE))
                return err_set(-EINVAL, "%s: an interface's name of 1 to %d characters is expected after '%%'", text,
                               IF_NAMESIZE - 1);
        return 0;
}

static int parse_v6(const char *text, const char *p, size_t len, struct tp_url *out)
{
        const char *close = memchr(p, ']', len);
        size_t used;
        int rc;

        if (!close)
                return err_set(-EINVAL, "%s: '[' without ']'", text);
        rc = copy_part(text, "host", out->host, sizeof(out->host), p + 1, (size_t)(close - p) - 1);
        if (rc < 0)
                return rc;
        rc = check_v6(text, out->host);
        if (rc < 0)
                return rc;
        used = (size_t)(close - p) + 1;
        if (used == len)
                return 0;
        if (p[used] != ':')
                return err_set(-EINVAL, "%s: expected ':' and a port after ']'", text);
        return parse_port(text, p + used + 1, len - used - 1, out);
}

static int parse_host(const char *text, const char *p, size_t len, struct tp_url *out)
{
        const char *colon;
        int rc;

        if (len > 0 && p[0] == '[')
                return parse_v6(text, p, len, out);
        colon = memchr(p, ':', len);
        if (colon && memchr(colon + 1, ':', len - (size_t)(colon - p) - 1))
                return err_set(-EINVAL, "%s: write an IPv6 address in brackets: [::1]:port", text);
        rc = copy_part(text, "host", out->host, sizeof(out->host), p, colon ? (size_t)(colon - p) : len);
        if (rc < 0)
                return rc;
        if (out->host[0] == '\0')
                return err_set(-EINVAL, "%s: no host, expected %s://host:port", text, out->scheme);
        if (strchr(out->host, '/'))
                return err_set(-EINVAL, "%s: '/' in the host, expected %s://host:port", text, out->scheme);
        return colon ? parse_port(text, colon + 1, len - (size_t)(colon - p) - 1, out) : 0;
}

static bool is_loopback_host(const char *host)
{
        unsigned char v6[16], v4[4];
        static const unsigned char mapped[13] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127};
        static const unsigned char one[16] = {[15] = 1};

        if (!strcmp(host, "localhost"))
                return true;
        if (inet_pton(AF_INET, host, v4) == 1)
                return v4[0] == 127;
        return inet_pton(AF_INET6, host, v6) == 1 && (!memcmp(v6, one, 16) || !memcmp(v6, mapped, 13));
}

static bool is_any_host(const char *host)
{
        static const unsigned char zeros[16];
        unsigned char a[16];

        if (!strcmp(host, "*"))
                return true;
        if (inet_pton(AF_INET, host, a) == 1)
                return !memcmp(a, zeros, 4);
        return inet_pton(AF_INET6, host, a) == 1 && !memcmp(a, zeros, 16);
}

int tp_url_parse(const char *text, struct tp_url *out)
{
        const char *rest = text, *query;
        size_t len;
        int rc;

        memset(out, 0, sizeof(*out));
        rc = check_chars(text);
        if (rc < 0)
                return rc;
        if (text[0] == '\0')
                return err_set(-EINVAL, "empty URL, expected one such as tcp://host:port or shm://name");
        rc = parse_scheme(text, out, &rest);
        if (rc < 0)
                return rc;
        query = strchr(rest, '?');
        len = query ? (size_t)(query - rest) : strlen(rest);
        if (query) {
                rc = copy_part(text, "part after '?'", out->query, sizeof(out->query), query + 1, strlen(query + 1));
                if (rc < 0)
                        return rc;
        }
        if (is_local_name(out->scheme)) {
                out->loopback = true;
                return copy_part(text, "name", out->host, sizeof(out->host), rest, len);
        }
        if (len > 0 && rest[len - 1] == '/')
                len--;
        rc = parse_host(text, rest, len, out);
        out->loopback = rc == 0 && is_loopback_host(out->host);
        out->any = rc == 0 && is_any_host(out->host);
        return rc;
}

bool tp_url_param(const struct tp_url *u, const char *key, char *buf, size_t len)
{
        size_t klen = strlen(key);

        for (const char *p = u->query; *p;) {
                size_t n = strcspn(p, "&");

                if (n >= klen && !memcmp(p, key, klen) && (n == klen || p[klen] == '=')) {
                        size_t vlen = n == klen ? 0 : n - klen - 1;

                        if (vlen >= len)
                                return false;
                        memcpy(buf, p + n - vlen, vlen);
                        buf[vlen] = '\0';
                        return true;
                }
                p += n + (p[n] == '&');
        }
        return false;
}
