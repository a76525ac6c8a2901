/* A libnvidia-ml.so.1 whose GPUs a test scripts: nvidia-ml-py runs on it unchanged.

   STATE (a macro, a path) names a file of lines, read anew at every call:

     device  INDEX MIG TOTAL USED RESERVED UTILIZATION ENERGY_MJ
     process INDEX LIST PID MEMORY GPU_INSTANCE COMPUTE_INSTANCE     LIST: compute or graphics
     sample  INDEX PID TIME_US SM
     minor   INDEX MINOR                                             of its device node; not said: INDEX
     error   CALL CODE
     delay   CALL MILLISECONDS

   Sizes are bytes; -1 is "not available". Structures and codes as in nvml.h of driver 575. */

#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, UNKNOWN = 999 };

typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } Process;
typedef struct { unsigned pid; unsigned long long time_us; unsigned sm, memory, encoder, decoder; } Sample;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
typedef struct { long long mig, total, used, reserved, utilization, energy; } Device;

_Static_assert(sizeof(Process) == 24, "nvmlProcessInfo_t");
_Static_assert(sizeof(Sample) == 32, "nvmlProcessUtilizationSample_t");

static FILE *state(void) { return fopen(STATE, "r"); }

/* The scripted result of a call; waits as long as it is told to. */
static int begin(const char *call) {
    char line[512], name[128];
    int code = SUCCESS, value;
    unsigned delay = 0;
    FILE *file = state();
    if (!file) return UNKNOWN;
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "error %127s %d", name, &value) == 2 && !strcmp(name, call)) code = value;
        if (sscanf(line, "delay %127s %d", name, &value) == 2 && !strcmp(name, call)) delay = value;
    }
    fclose(file);
    usleep(delay * 1000);
    return code;
}

static int device(const char *call, void *handle, Device *found) {
    char line[512];
    long index, wanted = (long)handle - 1;
    int code = begin(call), known = 0;
    FILE *file = state();
    if (!file) return UNKNOWN;
    while (!known && fgets(line, sizeof line, file))
        known = sscanf(line, "device %ld %lld %lld %lld %lld %lld %lld", &index, &found->mig, &found->total,
                       &found->used, &found->reserved, &found->utilization, &found->energy) == 7 && index == wanted;
    fclose(file);
    return code ? code : known ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlInitWithFlags(unsigned flags) { return (void)flags, begin("nvmlInit"); }
int nvmlInit_v2(void) { return begin("nvmlInit"); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { static char text[32]; sprintf(text, "scripted error %d", code); return text; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "575.57.08");
    return begin("nvmlSystemGetDriverVersion");
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    char line[512];
    int code = begin("nvmlDeviceGetCount");
    FILE *file = state();
    if (!file) return UNKNOWN;
    for (*count = 0; fgets(line, sizeof line, file);) *count += !strncmp(line, "device ", 7);
    fclose(file);
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(long)(index + 1);
    return begin("nvmlDeviceGetHandleByIndex");
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
    snprintf(uuid, length, "GPU-%08ld", (long)handle - 1);
    return begin("nvmlDeviceGetUUID");
}

int nvmlDeviceGetMinorNumber(void *handle, unsigned *minor) {
    char line[512];
    long index;
    unsigned value;
    int code = begin("nvmlDeviceGetMinorNumber");
    FILE *file = state();
    if (!file) return UNKNOWN;
    for (*minor = (long)handle - 1; fgets(line, sizeof line, file);)
        if (sscanf(line, "minor %ld %u", &index, &value) == 2 && index == (long)handle - 1) *minor = value;
    fclose(file);
    return code;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    Device found;
    int code = device("nvmlDeviceGetMigMode", handle, &found);
    *current = *pending = found.mig;
    return code;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    Device found;
    int code = device("nvmlDeviceGetMemoryInfo", handle, &found);
    memory->total = found.total;
    memory->used = found.used + found.reserved;
    memory->free = memory->total - memory->used;
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *memory) {
    Device found;
    int code = device("nvmlDeviceGetMemoryInfo_v2", handle, &found);
    memory->total = found.total;
    memory->reserved = found.reserved;
    memory->used = found.used;
    memory->free = found.total - found.used - found.reserved;
    return code;
}

int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    Device found;
    int code = device("nvmlDeviceGetUtilizationRates", handle, &found);
    rates[0] = found.utilization;
    rates[1] = 0;
    return code;
}

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy) {
    Device found;
    int code = device("nvmlDeviceGetTotalEnergyConsumption", handle, &found);
    *energy = found.energy;
    return code;
}

static int processes(const char *call, const char *list, void *handle, unsigned *count, Process *rows) {
    char line[512], name[32];
    long index;
    unsigned room = rows ? *count : 0, pid;
    long long memory, gpu_instance, compute_instance;
    Device found;
    int code = device(call, handle, &found);
    FILE *file = state();
    if (!file) return UNKNOWN;
    *count = 0;
    while (!code && fgets(line, sizeof line, file)) {
        if (sscanf(line, "process %ld %31s %u %lld %lld %lld", &index, name, &pid, &memory, &gpu_instance,
                   &compute_instance) != 6 || index != (long)handle - 1 || strcmp(name, list))
            continue;
        if (*count < room) rows[*count] = (Process){pid, memory, gpu_instance, compute_instance};
        ++*count;
    }
    fclose(file);
    return code ? code : *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *rows) {
    return processes("nvmlDeviceGetComputeRunningProcesses", "compute", handle, count, rows);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, Process *rows) {
    return processes("nvmlDeviceGetGraphicsRunningProcesses", "graphics", handle, count, rows);
}

#ifndef WITHOUT_PROCESS_UTILIZATION
int nvmlDeviceGetProcessUtilization(void *handle, Sample *rows, unsigned *count, unsigned long long since_us) {
    char line[512];
    long index;
    unsigned room = rows ? *count : 0, pid, sm;
    unsigned long long time_us;
    Device found;
    int code = device("nvmlDeviceGetProcessUtilization", handle, &found);
    FILE *file = state();
    if (!file) return UNKNOWN;
    *count = 0;
    while (!code && fgets(line, sizeof line, file)) {
        if (sscanf(line, "sample %ld %u %llu %u", &index, &pid, &time_us, &sm) != 4 || index != (long)handle - 1 ||
            time_us <= since_us)
            continue;
        if (*count < room) rows[*count] = (Sample){pid, time_us, sm, 0, 0, 0};
        ++*count;
    }
    fclose(file);
    return code ? code : !*count ? NOT_FOUND : *count > room ? INSUFFICIENT_SIZE : SUCCESS;
}
#endif
