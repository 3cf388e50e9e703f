#include "inside.h"

#include <endian.h>
#include <stdlib.h>
#include <sys/random.h>

#include "check.h"
#include "clock.h"
#include "err.h"

_Static_assert(sizeof(struct tpi_key) + 8 == TP_KEY_BYTES, "a key is seven words and a seal");

#define KEY_WORDS 7

static uint64_t key_seal(const uint64_t *le_words, uint64_t secret)
{
        uint64_t h = secret;

        for (unsigned i = 0; i < KEY_WORDS; i++)
                h = prng_at(h ^ le64toh(le_words[i]), secret, i);
        return h;
}

void tpi_key_seal(struct tp_key *out, const struct tpi_key *k, uint64_t secret)
{
        const uint64_t plain[KEY_WORDS] = {k->magic, k->side, k->slot, k->epoch, k->off, k->len, k->serial};
        uint64_t w[KEY_WORDS + 1];

        for (unsigned i = 0; i < KEY_WORDS; i++)
                w[i] = htole64(plain[i]);
        w[KEY_WORDS] = htole64(key_seal(w, secret));
        memcpy(out->bytes, w, sizeof(w));
}

int tpi_key_open(const struct tp_key *key, uint64_t secret, uint64_t magic, uint64_t side, struct tpi_key *out)
{
        uint64_t w[KEY_WORDS + 1];

        memcpy(w, key->bytes, sizeof(w));
        if (le64toh(w[KEY_WORDS]) != key_seal(w, secret))
                return err_set(-EACCES, "memory key: not one that the peer made for this connection, or damaged");
        *out = (struct tpi_key){le64toh(w[0]), le64toh(w[1]), le64toh(w[2]), le64toh(w[3]),
                                le64toh(w[4]), le64toh(w[5]), le64toh(w[6])};
        if (out->magic != magic || out->side != side)
                return err_set(-EACCES, "memory key: made by another transport or by this side itself");
        return 0;
}

uint64_t tpi_random(void)
{
        uint64_t v;

        /* Eight bytes from an initialised pool are never short; at early boot the clock and address must do. */
        if (getrandom(&v, sizeof(v), 0) != (ssize_t)sizeof(v))
                v = prng_at(clock_ns(), (uint64_t)(uintptr_t)&v, 0);
        return v;
}

static int wait_copy(const struct mem_region *r, int rc, uint64_t ticket)
{
        while (rc == 0) {
                rc = r->ops->test(r, ticket);
                if (rc == 0)
                        cpu_relax();
        }
        return rc < 0 ? rc : 0;
}

int tpi_region_put(const struct mem_region *r, size_t off, const void *src, size_t len)
{
        uint64_t ticket = 0;
        int rc;

        if (len == 0)
                return 0;
        if (r->kind == MEM_HOST) {
                memcpy((char *)r->addr + off, src, len);
                return 0;
        }
        rc = r->ops->put_async(r, off, src, len, &ticket);
        return wait_copy(r, rc, ticket);
}

int tpi_region_get(const struct mem_region *r, size_t off, void *dst, size_t len)
{
        uint64_t ticket = 0;
        int rc;

        if (len == 0)
                return 0;
        if (r->kind == MEM_HOST) {
                memcpy(dst, (const char *)r->addr + off, len);
                return 0;
        }
        rc = r->ops->get_async(r, off, dst, len, &ticket);
        return wait_copy(r, rc, ticket);
}

int tpi_url_expect(const char *url, const char *scheme, struct tp_url *out)
{
        int rc = tp_url_parse(url, out);

        if (rc < 0)
                return rc;
        if (strcmp(out->scheme, scheme) != 0)
                return err_set(-EINVAL, "%s: this context speaks %s only", url, scheme);
        return 0;
}
