#include "keys.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sodium.h>

#include "check.h"
#include "err.h"
#include "files.h"

#define FILE_MIN_BYTES 32
#define FILE_MAX_BYTES (1u << 20)

_Static_assert(KEY_BYTES == crypto_auth_KEYBYTES, "the key is crypto_auth's");
_Static_assert(PROOF_BYTES == crypto_auth_BYTES, "the proof is crypto_auth's");

/* Fails only where the kernel has no random numbers to give; nothing can be proved there. */
static void need_sodium(void)
{
        BUG_ON(sodium_init() < 0);
}

static int check_file(int fd, const char *path)
{
        struct stat st;

        if (fstat(fd, &st) < 0)
                return err_set(-errno, "%s: cannot look at the key file: %s", path, strerror(errno));
        if (!S_ISREG(st.st_mode))
                return err_set(-EINVAL, "%s: a key file must be a regular file", path);
        if (st.st_mode & (S_IRWXG | S_IRWXO))
                return err_set(-EPERM, "%s: others can read or change this key (mode %04o); do: chmod 600 %s", path,
                               (unsigned)st.st_mode & 07777, path);
        return 0;
}

static int read_key(int fd, const char *path, struct auth_key *out)
{
        char *text;
        size_t len;
        int rc = check_file(fd, path);

        if (rc == 0)
                rc = file_read_fd(fd, path, FILE_MAX_BYTES, &text, &len);
        if (rc < 0)
                return rc;
        if (len < FILE_MIN_BYTES) {
                rc = err_set(-EINVAL,
                             "%s: a key file needs at least %d bytes, this one has %zu; make one with: "
                             "head -c 32 /dev/urandom",
                             path, FILE_MIN_BYTES, len);
        } else {
                crypto_generichash(out->bytes, KEY_BYTES, (const unsigned char *)text, len, NULL, 0);
                out->present = true;
        }
        sodium_memzero(text, len);
        free(text);
        return rc;
}

int key_load(const char *path, struct auth_key *out)
{
        need_sodium();
        /* O_NONBLOCK: a FIFO must be refused, not waited for. */
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

        if (fd < 0)
                return err_set(-errno, "%s: cannot open the key file: %s", path, strerror(errno));
        int rc = read_key(fd, path, out);

        close(fd);
        return rc;
}

void key_random(struct auth_key *out)
{
        need_sodium();
        randombytes_buf(out->bytes, KEY_BYTES);
        out->present = true;
}

void nonce_random(uint8_t out[NONCE_BYTES])
{
        need_sodium();
        randombytes_buf(out, NONCE_BYTES);
}

/* The role stands in front so that a proof cannot be reflected to the one who made it. */
#define ROLE_BYTES 12
static const char role_text[][ROLE_BYTES + 1] = {[AUTH_CLIENT] = "djinn client", [AUTH_SERVER] = "djinn server"};

struct challenge {
        uint8_t role[ROLE_BYTES], nonce_c[NONCE_BYTES], nonce_s[NONCE_BYTES];
};

_Static_assert(sizeof(struct challenge) == ROLE_BYTES + 2 * NONCE_BYTES, "no padding is authenticated");

static struct challenge challenge_of(enum auth_role role, const uint8_t *nonce_c, const uint8_t *nonce_s)
{
        struct challenge c;

        memcpy(c.role, role_text[role], ROLE_BYTES);
        memcpy(c.nonce_c, nonce_c, NONCE_BYTES);
        memcpy(c.nonce_s, nonce_s, NONCE_BYTES);
        return c;
}

void auth_prove(const struct auth_key *key, enum auth_role role, const uint8_t nonce_c[NONCE_BYTES],
                const uint8_t nonce_s[NONCE_BYTES], uint8_t out[PROOF_BYTES])
{
        BUG_ON(!key->present);
        need_sodium();
        struct challenge c = challenge_of(role, nonce_c, nonce_s);

        crypto_auth(out, (const unsigned char *)&c, sizeof(c), key->bytes);
}

bool auth_check(const struct auth_key *key, enum auth_role role, const uint8_t nonce_c[NONCE_BYTES],
                const uint8_t nonce_s[NONCE_BYTES], const uint8_t proof[PROOF_BYTES])
{
        if (!key->present)
                return false;
        need_sodium();
        struct challenge c = challenge_of(role, nonce_c, nonce_s);

        return crypto_auth_verify(proof, (const unsigned char *)&c, sizeof(c), key->bytes) == 0;
}
