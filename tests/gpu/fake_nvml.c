/* A libnvidia-ml.so.1 that tells whatever the test wants.
 *
 * The scenario is one word: the content of the file that FAKE_NVML_SCENARIO_FILE names, read anew
 * by each call, so that a test can change it while a process runs.
 *
 * Handles carry the generation of nvmlInit that made them. Once a GPU was lost, handles of that
 * generation stay lost even when the scenario turns healthy, as with the real library: only a
 * reader that shuts down and starts anew sees the GPU again.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    UNKNOWN = 999
};

#define GIB (1024ULL * 1024 * 1024)
#define MIG_SLOTS 7

typedef struct {
    unsigned long long total, free, used;
} memory_t;

static int initialised;
static uintptr_t generation;
static uintptr_t lost_generation;

static int scenario_is(const char *word)
{
    char text[64] = "";
    const char *path = getenv("FAKE_NVML_SCENARIO_FILE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (file) {
        if (fscanf(file, "%63s", text) != 1)
            text[0] = 0;
        fclose(file);
    }
    return strcmp(text, word) == 0;
}

/* 1 byte of index, 1 byte of MIG instance + 1, the rest generation. Never NULL. */
static void *make_handle(unsigned index, unsigned instance)
{
    return (void *)((generation << 16) | ((uintptr_t)instance << 8) | (index + 1));
}
static unsigned index_of(void *handle) { return (unsigned)((uintptr_t)handle & 0xff) - 1; }
static unsigned instance_of(void *handle) { return (unsigned)(((uintptr_t)handle >> 8) & 0xff); }

static int check(void *handle)
{
    uintptr_t of = (uintptr_t)handle >> 16;
    if (!initialised)
        return UNINITIALIZED;
    if (scenario_is("lost"))
        lost_generation = generation;
    if (of == lost_generation)
        return GPU_IS_LOST;
    return of == generation ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    if (scenario_is("driver_not_loaded"))
        return DRIVER_NOT_LOADED;
    if (scenario_is("no_permission"))
        return NO_PERMISSION;
    if (!initialised++)
        generation++;
    return SUCCESS;
}

int nvmlShutdown(void)
{
    if (!initialised)
        return UNINITIALIZED;
    initialised--;
    return SUCCESS;
}

const char *nvmlErrorString(int code)
{
    (void)code;
    return "fake";
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!initialised || scenario_is("uninitialised"))
        return UNINITIALIZED;
    *count = scenario_is("no_gpu") ? 0
             : scenario_is("two") || scenario_is("two_unified") || scenario_is("one_of_two_lost") ||
                     scenario_is("one_of_two_hidden")
                 ? 2
                 : 1;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    if (!initialised)
        return UNINITIALIZED;
    if (index == 1 && scenario_is("one_of_two_hidden"))
        return NO_PERMISSION;
    *handle = make_handle(index, 0);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    if (scenario_is("bad_name")) {
        snprintf(name, length, "\xff\xfe");
        return SUCCESS;
    }
    if (instance_of(handle))
        snprintf(name, length, "Fake GPU MIG %u", instance_of(handle) - 1);
    else
        snprintf(name, length, "Fake GPU %u", index_of(handle));
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    int status = check(handle);
    if (status != SUCCESS)
        return status;
    if (!scenario_is("mig") && !scenario_is("mig_empty"))
        return NOT_SUPPORTED;
    *current = *pending = 1;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    (void)handle;
    *count = MIG_SLOTS;
    return SUCCESS;
}

/* Slots 0 and 2 are taken, slot 3 belongs to somebody else, the others are empty. */
int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **instance)
{
    if (scenario_is("mig_empty"))
        return NOT_FOUND;
    if (index == 3)
        return NO_PERMISSION;
    if (index != 0 && index != 2)
        return NOT_FOUND;
    *instance = make_handle(index_of(handle), index + 1);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory)
{
    struct timespec pause = {0, 10 * 1000 * 1000};
    int status = check(handle);
    if (status != SUCCESS)
        return status;
    while (scenario_is("hanging"))
        nanosleep(&pause, NULL);
    if (scenario_is("not_supported"))
        return NOT_SUPPORTED;
    if (scenario_is("future_error"))
        return 4242;
    if (index_of(handle) == 1 && scenario_is("one_of_two_lost"))
        return GPU_IS_LOST;
    memset(memory, 0, sizeof *memory);
    if (scenario_is("zero_total") || scenario_is("two_unified"))
        return SUCCESS;
    if (instance_of(handle)) {
        memory->total = 10 * GIB;
        memory->free = (instance_of(handle) - 1 + 1) * GIB; /* slot 0: 1 GiB, slot 2: 3 GiB */
    } else {
        memory->total = 24 * GIB;
        memory->free = (20 + index_of(handle)) * GIB; /* 20 GiB, 21 GiB */
    }
    memory->used = memory->total - memory->free;
    return SUCCESS;
}
