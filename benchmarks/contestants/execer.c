/* What every contestant of execs.py runs: fork, execve of /usr/bin/true and waitpid, again and again.
 *
 * Reads lines: "exec COUNT". Answers each with one line: the nanoseconds of every turn.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

int main(void) {
    char line[64], *argv[] = {"true", NULL}, *none[] = {NULL};
    while (fgets(line, sizeof line, stdin)) {
        int count = atoi(line + 5), status;
        for (int i = 0; i < count; i++) {
            long began = now();
            pid_t child = fork();
            if (child == 0) {
                execve("/usr/bin/true", argv, none);
                _exit(127);
            }
            if (waitpid(child, &status, 0) != child || status) return 3;
            printf("%ld ", now() - began);
        }
        printf("\n");
        fflush(stdout);
    }
    return 0;
}
