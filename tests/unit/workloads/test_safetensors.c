#include <errno.h>

#include "wl_fixture.h"

#include "weights.h"

/* Two tensors, "a" F32 [2,3] and "b" F16 [2], that cover 28 bytes. */
#define GOOD                                                                 \
        "{\"__metadata__\":{\"format\":\"pt\"},"                             \
        "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]}," \
        "\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[24,28]}}"

static const unsigned char data28[28] = {0,    0, 0x80, 0x3f, 0,    0, 0, 0x40, 0,    0,    0x40, 0x40, 0,   0, 0x80,
                                         0x40, 0, 0,    0xa0, 0x40, 0, 0, 0xc0, 0x40, 0x00, 0x3c, 0x00, 0xc0};

static int open_in(const char *dir, struct checkpoint **c)
{
        int fd = open_dir(dir), rc;

        err_clear();
        rc = checkpoint_open(fd, "model", c);
        close(fd);
        return rc;
}

static int open_header(const char *header, uint64_t claim, size_t len, struct checkpoint **c)
{
        char dir[64], *data = calloc(1, len + 1);

        tmp_dir(dir);
        memcpy(data, data28, len < 28 ? len : 28);
        put_safetensors(dir, "model.safetensors", header, claim, data, len);
        free(data);
        int rc = open_in(dir, c);

        tmp_gone(dir);
        return rc;
}

static void reads_what_was_written(void **state)
{
        struct checkpoint *c;
        float v[6];

        must(open_header(GOOD "  \n", 0, 28, &c));
        const struct checkpoint_tensor *a = checkpoint_find(c, "a"), *b = checkpoint_find(c, "b");

        assert_non_null(a);
        assert_int_equal(a->dtype, DT_F32);
        assert_int_equal(a->ndim, 2);
        assert_int_equal(a->dims[1], 3);
        assert_int_equal(a->bytes, 24);
        assert_null(checkpoint_find(c, "c"));
        assert_null(checkpoint_find(c, "__metadata__"));
        assert_string_equal(checkpoint_lack(c, "c"), "is not in the checkpoint");
        must(checkpoint_read_f32(c, a, 1, 5, v));
        for (int i = 0; i < 5; i++)
                assert_close(v[i], 2 + i, 0);
        must(checkpoint_read_f32(c, b, 0, 2, v));
        assert_close(v[0], 1, 0);
        assert_close(v[1], -2, 0);
        must(checkpoint_read_f32(c, b, 1, 1, v));
        assert_close(v[0], -2, 0);
        assert_int_equal(checkpoint_read_f32(c, a, 1, 6, v), -EINVAL);
        assert_int_equal(checkpoint_read_f32(c, a, SIZE_MAX, 2, v), -EINVAL);
        checkpoint_close(c);
        checkpoint_close(NULL);
}

static void bf16_is_read(void **state)
{
        char dir[64];
        struct checkpoint *c;
        const uint16_t raw[] = {0x3f80, 0xc040, 0x0000};
        float v[3];

        tmp_dir(dir);
        put_safetensors(dir, "model.safetensors", "{\"w\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[0,6]}}",
                        0, raw, 6);
        must(open_in(dir, &c));
        must(checkpoint_read_f32(c, checkpoint_find(c, "w"), 0, 3, v));
        assert_close(v[0], 1, 0);
        assert_close(v[1], -3, 0);
        assert_close(v[2], 0, 0);
        checkpoint_close(c);
        tmp_gone(dir);
}

#define A(dtype, shape, offsets) \
        "{\"bad.weight\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"
#define B(offsets)  ",\"b.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" offsets "}}"
#define A1(offsets) "{\"a.weight\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":" offsets "}"

static const struct {
        const char *header;
        uint64_t claim;
        size_t data;
        const char *sentence, *tensor;
} hostile[] = {
    {GOOD, 1000, 28, "header claims 1000 bytes", "model.safetensors"},
    {GOOD, UINT64_MAX, 28, "header claims", "model.safetensors"},
    {GOOD, 100000001, 28, "header claims", "model.safetensors"},
    {GOOD, 20, 28, "offset", "model.safetensors"},
    {GOOD, 0, 27, "truncated", "\"b\""},
    {GOOD, 0, 23, "truncated", "\"a\""},
    {GOOD, 0, 29, "belong to no tensor", "model.safetensors"},
    {A("F32", "[2]", "[0,4]"), 0, 4, "need 8", "bad.weight"},
    {A("F32", "[2]", "[0,12]"), 0, 12, "need 8", "bad.weight"},
    {A("F32", "[2]", "[8,0]"), 0, 8, "ends before it begins", "bad.weight"},
    {A("F32", "[2]", "[-8,0]"), 0, 8, "data_offsets", "bad.weight"},
    {A("F32", "[2]", "[0,8.5]"), 0, 9, "data_offsets", "bad.weight"},
    {A("F32", "[2]", "[0]"), 0, 8, "data_offsets", "bad.weight"},
    {A("F32", "[2]", "[0,8,16]"), 0, 8, "data_offsets", "bad.weight"},
    {A("F32", "[2]", "\"0,8\""), 0, 8, "data_offsets", "bad.weight"},
    {A("F32", "[2]", "[0,18446744073709551616]"), 0, 8, "data_offsets", "bad.weight"},
    {A("F32", "[2]", "[0,1e308]"), 0, 8, "data_offsets", "bad.weight"},
    {A("F32", "[-2]", "[0,8]"), 0, 8, "dimension", "bad.weight"},
    {A("F32", "[2.5]", "[0,10]"), 0, 10, "dimension", "bad.weight"},
    {A("F32", "[[2]]", "[0,8]"), 0, 8, "dimension", "bad.weight"},
    {A("F32", "[\"2\"]", "[0,8]"), 0, 8, "dimension", "bad.weight"},
    {A("F32", "2", "[0,8]"), 0, 8, "shape", "bad.weight"},
    {A("F32", "{\"0\":2}", "[0,8]"), 0, 8, "shape", "bad.weight"},
    {A("F32", "[4294967296,4294967296]", "[0,0]"), 0, 0, "2^50", "bad.weight"},
    {A("F32", "[1125899906842624,1125899906842624,1125899906842624]", "[0,0]"), 0, 0, "2^50", "bad.weight"},
    {A("F32", "[0,1125899906842624,4096]", "[0,0]"), 0, 0, "2^50", "bad.weight"},
    {"{\"bad.weight\":[1,2]}", 0, 0, "not an object", "bad.weight"},
    {"{\"bad.weight\":{\"shape\":[2],\"data_offsets\":[0,8]}}", 0, 8, "dtype", "bad.weight"},
    {"{\"bad.weight\":{\"dtype\":7,\"shape\":[2],\"data_offsets\":[0,8]}}", 0, 8, "dtype", "bad.weight"},
    {A1("[0,8]") B("[4,12]"), 0, 12, "overlaps", "b.weight"},
    {A1("[0,8]") B("[0,8]"), 0, 8, "overlaps", "weight"},
    {A1("[0,8]") B("[12,20]"), 0, 20, "hole", "b.weight"},
    {A1("[4,12]") B("[12,20]"), 0, 20, "hole", "a.weight"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
     "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}",
     0, 8, "twice", "\"a\""},
    {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 0, 4, "u0000", "model.safetensors"},
    {"{\"\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 0, 4, "UTF-8", "model.safetensors"},
    {"[1]", 0, 0, "not an object", "model.safetensors"},
    {"", 0, 0, "model.safetensors", "model.safetensors"},
    {"{\"a\":", 0, 0, "offset", "model.safetensors"},
};

static void hostile_headers_are_refused_by_name(void **state)
{
        for (size_t i = 0; i < sizeof(hostile) / sizeof(hostile[0]); i++) {
                struct checkpoint *c;

                if (open_header(hostile[i].header, hostile[i].claim, hostile[i].data, &c) != -EINVAL)
                        fail_msg("header %zu was accepted: %s", i, hostile[i].header);
                assert_null(c);
                assert_sentence(hostile[i].sentence);
                assert_sentence(hostile[i].tensor);
        }
}

static void deep_nesting_is_refused(void **state)
{
        char *header = malloc(400001);
        struct checkpoint *c;

        memset(header, '[', 200000);
        memset(header + 200000, ']', 200000);
        header[400000] = 0;
        assert_int_equal(open_header(header, 0, 0, &c), -EINVAL);
        free(header);

        /* More values than a header may hold cost no parsing. */
        header = malloc(5000001);
        memset(header, ',', 5000000);
        header[5000000] = 0;
        assert_int_equal(open_header(header, 0, 0, &c), -EINVAL);
        assert_sentence("more than 4000000 values");
        free(header);
}

static void odd_dtypes_matter_only_when_used(void **state)
{
        struct checkpoint *c;

        must(open_header("{\"mask\":{\"dtype\":\"BOOL\",\"shape\":[4],\"data_offsets\":[0,4]},"
                         "\"new\":{\"dtype\":\"F4_X\",\"shape\":[1000],\"data_offsets\":[4,7]},"
                         "\"deep\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[7,11]},"
                         "\"scalar\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[11,15]},"
                         "\"none\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[15,15]},"
                         "\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[15,19]}}",
                         0, 19, &c));
        static const char *const odd[][2] = {{"mask", "BOOL"},
                                             {"new", "F4_X"},
                                             {"deep", "4 dimensions"},
                                             {"scalar", "no dimensions"},
                                             {"none", "empty"}};

        for (size_t i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
                assert_null(checkpoint_find(c, odd[i][0]));
                assert_non_null(strstr(checkpoint_lack(c, odd[i][0]), odd[i][1]));
        }
        assert_non_null(checkpoint_find(c, "a"));
        checkpoint_close(c);
}

static void a_file_cut_under_our_feet_is_an_error(void **state)
{
        char dir[64], path[128];
        struct checkpoint *c;
        float v[6];

        tmp_dir(dir);
        put_safetensors(dir, "model.safetensors", GOOD, 0, data28, 28);
        must(open_in(dir, &c));
        snprintf(path, sizeof(path), "%s/model.safetensors", dir);
        assert_int_equal(truncate(path, (off_t)(8 + strlen(GOOD) + 10)), 0);
        must(checkpoint_read_f32(c, checkpoint_find(c, "a"), 0, 2, v));
        assert_int_equal(checkpoint_read_f32(c, checkpoint_find(c, "a"), 0, 6, v), -EIO);
        assert_sentence("\"a\"");
        assert_sentence("shorter");
        checkpoint_close(c);
        tmp_gone(dir);
}

static void missing_files_are_named(void **state)
{
        char dir[64];
        struct checkpoint *c;

        tmp_dir(dir);
        assert_int_equal(open_in(dir, &c), -ENOENT);
        assert_sentence("model.safetensors");
        assert_sentence("model.safetensors.index.json");
        put_text_file(dir, "pytorch_model.bin", "x");
        assert_int_equal(open_in(dir, &c), -ENOENT);
        assert_sentence("pytorch_model.bin");
        put_text_file(dir, "model.safetensors", "1234567");
        assert_int_equal(open_in(dir, &c), -EINVAL);
        assert_sentence("too few");
        tmp_gone(dir);
}

/* ---- shards ---- */

#define SHARD(name) "{\"" name "\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}"

static int open_sharded(const char *index, struct checkpoint **c)
{
        char dir[64];

        tmp_dir(dir);
        put_safetensors(dir, "one.safetensors", SHARD("a"), 0, data28, 4);
        put_safetensors(dir, "two.safetensors", SHARD("b"), 0, data28 + 4, 4);
        put_safetensors(dir, "again.safetensors", SHARD("a"), 0, data28, 4);
        put_text_file(dir, "model.safetensors.index.json", index);
        int rc = open_in(dir, c);

        tmp_gone(dir);
        return rc;
}

static void shards_are_read(void **state)
{
        struct checkpoint *c;
        float v;

        must(
            open_sharded("{\"metadata\":{},\"weight_map\":{\"b\":\"two.safetensors\",\"a\":\"one.safetensors\"}}", &c));
        must(checkpoint_read_f32(c, checkpoint_find(c, "a"), 0, 1, &v));
        assert_close(v, 1, 0);
        must(checkpoint_read_f32(c, checkpoint_find(c, "b"), 0, 1, &v));
        assert_close(v, 2, 0);
        checkpoint_close(c);
}

static void lying_indices_are_refused(void **state)
{
        static const char *const bad[][2] = {
            {"{\"weight_map\":{\"a\":\"two.safetensors\"}}", "\"a\" is not in two.safetensors"},
            {"{\"weight_map\":{\"c\":\"one.safetensors\"}}", "\"c\" is not in one.safetensors"},
            {"{\"weight_map\":{\"a\":\"one.safetensors\",\"x\":\"again.safetensors\"}}", "stands in two files"},
            {"{\"weight_map\":{\"a\":\"../one.safetensors\"}}", "\"a\""},
            {"{\"weight_map\":{\"a\":\"/etc/passwd\"}}", "\"a\""},
            {"{\"weight_map\":{\"a\":\"..\"}}", "\"a\""},
            {"{\"weight_map\":{\"a\":7}}", "\"a\""},
            {"{\"weight_map\":{\"a\":\"none.safetensors\"}}", "none.safetensors"},
            {"{\"weight_map\":{}}", "weight_map"},
            {"{}", "weight_map"},
            {"[]", "weight_map"},
            {"{", "index.json"},
        };
        struct checkpoint *c;

        for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
                if (open_sharded(bad[i][0], &c) != -EINVAL)
                        fail_msg("%s was accepted", bad[i][0]);
                assert_sentence(bad[i][1]);
        }
}

static void a_link_out_of_the_folder_is_refused(void **state)
{
        char dir[64], other[64], target[128], link[128];
        struct checkpoint *c;

        tmp_dir(dir);
        tmp_dir(other);
        put_safetensors(other, "model.safetensors", GOOD, 0, data28, 28);
        snprintf(target, sizeof(target), "%s/model.safetensors", other);
        snprintf(link, sizeof(link), "%s/model.safetensors", dir);
        assert_int_equal(symlink(target, link), 0);
        assert_int_equal(open_in(dir, &c), -EXDEV);
        assert_sentence("leads out");
        tmp_gone(dir);
        tmp_gone(other);
}

static void random_damage_never_crashes(void **state)
{
        char dir[64];
        size_t hlen = strlen(GOOD), len = 8 + hlen + 28, accepted = 0;
        unsigned char *good = malloc(len), *b = malloc(len);
        struct prng p;

        tmp_dir(dir);
        memcpy(good, (uint64_t[]){hlen}, 8);
        memcpy(good + 8, GOOD, hlen);
        memcpy(good + 8 + hlen, data28, 28);
        prng_seed(&p, 11);
        for (int round = 0; round < 5000; round++) {
                struct checkpoint *c;
                float v[8];

                memcpy(b, good, len);
                put_file(dir, "model.safetensors", b, mutate(&p, b, len));
                if (open_in(dir, &c) < 0)
                        continue;
                accepted++;
                const struct checkpoint_tensor *a = checkpoint_find(c, "a");

                if (a)
                        checkpoint_read_f32(
                            c, a, 0, a->bytes / op_dtype_bytes(a->dtype) < 8 ? a->bytes / op_dtype_bytes(a->dtype) : 8,
                            v);
                checkpoint_close(c);
        }
        assert_true(accepted > 100);
        free(good);
        free(b);
        tmp_gone(dir);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(reads_what_was_written),
            cmocka_unit_test(bf16_is_read),
            cmocka_unit_test(hostile_headers_are_refused_by_name),
            cmocka_unit_test(deep_nesting_is_refused),
            cmocka_unit_test(odd_dtypes_matter_only_when_used),
            cmocka_unit_test(a_file_cut_under_our_feet_is_an_error),
            cmocka_unit_test(missing_files_are_named),
            cmocka_unit_test(shards_are_read),
            cmocka_unit_test(lying_indices_are_refused),
            cmocka_unit_test(a_link_out_of_the_folder_is_refused),
            cmocka_unit_test(random_damage_never_crashes),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
