#include "keys.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#include "unit.h"

static char path[] = "/tmp/test-keys-XXXXXX";

static int set_up(void **state)
{
        int fd = mkstemp(path);

        close(fd);
        return fd < 0;
}

static int tear_down(void **state)
{
        return unlink(path);
}

static void write_key(const char *text, size_t len, mode_t mode)
{
        int fd = open(path, O_WRONLY | O_TRUNC);

        assert_true(fd >= 0);
        assert_int_equal(write(fd, text, len), len);
        assert_int_equal(fchmod(fd, mode), 0);
        close(fd);
}

static const char good[] = "0123456789abcdef0123456789abcdef";

static void loads_and_hashes(void **state)
{
        struct auth_key a = {0}, b = {0};

        write_key(good, 32, 0600);
        assert_int_equal(key_load(path, &a), 0);
        assert_true(a.present);
        assert_memory_not_equal(a.bytes, good, KEY_BYTES);
        assert_int_equal(key_load(path, &b), 0);
        assert_memory_equal(a.bytes, b.bytes, KEY_BYTES);
        write_key("0123456789abcdef0123456789abcdef\n", 33, 0400);
        assert_int_equal(key_load(path, &b), 0);
        assert_memory_not_equal(a.bytes, b.bytes, KEY_BYTES);
}

static void keys_that_others_see_are_refused(void **state)
{
        static const mode_t bad[] = {0640, 0620, 0604, 0602, 0666, 0610, 0601};
        struct auth_key k = {0};

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                write_key(good, 32, bad[i]);
                assert_int_equal(key_load(path, &k), -EPERM);
                assert_sentence("chmod 600");
                assert_sentence(path);
                assert_false(k.present);
        }
}

static void short_absent_and_irregular_are_refused(void **state)
{
        struct auth_key k = {0};
        char fifo[64];

        write_key(good, 31, 0600);
        assert_int_equal(key_load(path, &k), -EINVAL);
        assert_sentence("at least 32 bytes, this one has 31");
        write_key("", 0, 0600);
        assert_int_equal(key_load(path, &k), -EINVAL);
        assert_int_equal(key_load("/nonexistent/key", &k), -ENOENT);
        assert_sentence("/nonexistent/key");
        assert_int_equal(key_load("/tmp", &k), -EINVAL);
        assert_sentence("regular file");
        snprintf(fifo, sizeof(fifo), "%s.fifo", path);
        assert_int_equal(mkfifo(fifo, 0600), 0);
        assert_int_equal(key_load(fifo, &k), -EINVAL); /* and does not wait for a writer */
        unlink(fifo);
        assert_false(k.present);
}

static void only_the_same_key_proves(void **state)
{
        uint8_t nc[NONCE_BYTES], ns[NONCE_BYTES], proof[PROOF_BYTES];
        struct auth_key k = {0}, other = {0}, none = {0};

        key_random(&k);
        key_random(&other);
        nonce_random(nc);
        nonce_random(ns);
        assert_memory_not_equal(nc, ns, NONCE_BYTES);
        auth_prove(&k, AUTH_CLIENT, nc, ns, proof);
        assert_true(auth_check(&k, AUTH_CLIENT, nc, ns, proof));
        assert_false(auth_check(&other, AUTH_CLIENT, nc, ns, proof));
        assert_false(auth_check(&none, AUTH_CLIENT, nc, ns, proof));
        assert_false(auth_check(&k, AUTH_SERVER, nc, ns, proof)); /* no reflection */
        assert_false(auth_check(&k, AUTH_CLIENT, ns, nc, proof));
        for (unsigned bit = 0; bit < 8 * PROOF_BYTES; bit++) {
                proof[bit / 8] ^= (uint8_t)(1u << bit % 8);
                assert_false(auth_check(&k, AUTH_CLIENT, nc, ns, proof));
                proof[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
        nc[0] ^= 1;
        assert_false(auth_check(&k, AUTH_CLIENT, nc, ns, proof)); /* no replay */
}

/* HMAC-SHA-512 of "djinn server" | 32 x 01 | 32 x 02 under the key 00 01 .. 1f, cut to 32 bytes; computed elsewhere.
 * The two ends may be different builds: it must not change. */
static void known_proof(void **state)
{
        static const uint8_t want[PROOF_BYTES] = {0x0a, 0xfc, 0xa0, 0x0f, 0x08, 0xb0, 0x89, 0xbf, 0x68, 0x58, 0xcd,
                                                  0xd0, 0x7c, 0x99, 0x7c, 0x38, 0xe8, 0xcc, 0xf5, 0x0c, 0x13, 0xb0,
                                                  0x23, 0xfa, 0x0b, 0x4b, 0x23, 0xbc, 0x26, 0xde, 0x6d, 0x4d};
        uint8_t nc[NONCE_BYTES], ns[NONCE_BYTES], proof[PROOF_BYTES];
        struct auth_key k = {.present = true};

        for (uint8_t i = 0; i < KEY_BYTES; i++)
                k.bytes[i] = i;
        memset(nc, 1, sizeof(nc));
        memset(ns, 2, sizeof(ns));
        auth_prove(&k, AUTH_SERVER, nc, ns, proof);
        assert_memory_equal(proof, want, PROOF_BYTES);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(loads_and_hashes),
            cmocka_unit_test(keys_that_others_see_are_refused),
            cmocka_unit_test(short_absent_and_irregular_are_refused),
            cmocka_unit_test(only_the_same_key_proves),
            cmocka_unit_test(known_proof),
        };

        return cmocka_run_group_tests_name("keys", tests, set_up, tear_down);
}
