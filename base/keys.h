/*
 * Keys and mutual challenge-response (libsodium). Authenticates; does not encrypt.
 *   client HELLO  : nonce_c
 *   server HELLO' : nonce_s
 *   client AUTH   : proof_c = HMAC-SHA512/256(key, "djinn client" | nonce_c | nonce_s)
 *   server AUTH'  : proof_s = HMAC-SHA512/256(key, "djinn server" | nonce_c | nonce_s), only after proof_c held
 * A client with a wrong key learns nothing but "refused".
 */
#ifndef DJINN_BASE_KEYS_H
#define DJINN_BASE_KEYS_H

#include <stdbool.h>
#include <stdint.h>

#define KEY_BYTES   32
#define NONCE_BYTES 32
#define PROOF_BYTES 32

struct auth_key {
        bool present;
        uint8_t bytes[KEY_BYTES];
};

/* Reads a key file: 32 bytes or more of any content, hashed to a key. Refused (sentence) when the file can be read or
 * written by group or others, is not a regular file, or is shorter than 32 bytes. */
int key_load(const char *path, struct auth_key *out);
void key_random(struct auth_key *out);
void nonce_random(uint8_t out[NONCE_BYTES]);
enum auth_role { AUTH_CLIENT, AUTH_SERVER };
void auth_prove(const struct auth_key *key, enum auth_role role, const uint8_t nonce_c[NONCE_BYTES],
                const uint8_t nonce_s[NONCE_BYTES], uint8_t out[PROOF_BYTES]);
/* Constant time. */
bool auth_check(const struct auth_key *key, enum auth_role role, const uint8_t nonce_c[NONCE_BYTES],
                const uint8_t nonce_s[NONCE_BYTES], const uint8_t proof[PROOF_BYTES]);

#endif
