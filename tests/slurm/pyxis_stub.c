/* In the place of NVIDIA's pyxis, for tests: a real srun takes its options, and each task finds in
 * its environment what it was given. No container is started. */
#include <slurm/spank.h>
#include <stdio.h>

SPANK_PLUGIN(pyxis_stub, 1)

static const struct {
    const char *option, *argument;
} known[] = {
    {"container-image", "IMAGE"},
    {"container-mounts", "MOUNTS"},
    {"container-env", "NAMES"},
    {"no-container-mount-home", NULL},
};
#define COUNT (int)(sizeof known / sizeof *known)

static char given[COUNT][8192];

static int take(int which, const char *value, int remote) {
    (void)remote;
    snprintf(given[which], sizeof given[which], "%s", value && *value ? value : "given");
    return 0;
}

int slurm_spank_init(spank_t spank, int count, char **arguments) {
    (void)count;
    (void)arguments;
    for (int i = 0; i < COUNT; i++) {
        struct spank_option option = {
            .name = (char *)known[i].option,
            .arginfo = (char *)known[i].argument,
            .usage = "noted",
            .has_arg = known[i].argument != NULL,
            .val = i,
            .cb = take,
        };
        if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
            return -1;
    }
    return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments) {
    (void)count;
    (void)arguments;
    for (int i = 0; i < COUNT; i++) {
        char name[64];
        snprintf(name, sizeof name, "STUB_%d", i);
        if (given[i][0])
            spank_setenv(spank, name, given[i], 1);
    }
    return 0;
}
