/* What a contestant of connect.py runs: the same loop for all, so that only the confinement differs.
 *
 * Reads lines from standard input:
 *   try PORT                   one connect to 127.0.0.1:PORT; answers with its errno, 0 for none
 *   connect PORT COUNT THREADS COUNT times socket, connect, close in each of THREADS threads; answers with three lines:
 *                              nanoseconds of the whole, of each turn, of each connect alone
 */
#include <arpa/inet.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1 << 16 };
static long turns[MOST], connects[MOST];
static struct sockaddr_in peer;
static pthread_barrier_t barrier;
struct share { int first, count; };

static long now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static void *work(void *argument) {
    struct share *share = argument;
    pthread_barrier_wait(&barrier);
    for (int i = share->first; i < share->first + share->count; i++) {
        long began = now();
        int s = socket(AF_INET, SOCK_STREAM, 0);
        long before = now();
        int failed = connect(s, (struct sockaddr *)&peer, sizeof peer);
        long after = now();
        close(s);
        turns[i] = now() - began;
        connects[i] = after - before;
        if (failed) {
            perror("connect");
            exit(1);
        }
    }
    return NULL;
}

static void print(const long *values, int count) {
    for (int i = 0; i < count; i++) printf(i ? " %ld" : "%ld", values[i]);
    printf("\n");
}

int main(void) {
    char line[256];
    int port, count, threads;
    peer.sin_family = AF_INET;
    peer.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "try %d", &port) == 1) {
            peer.sin_port = htons(port);
            int s = socket(AF_INET, SOCK_STREAM, 0);
            printf("%d\n", connect(s, (struct sockaddr *)&peer, sizeof peer) ? errno : 0);
            close(s);
        } else if (sscanf(line, "connect %d %d %d", &port, &count, &threads) == 3 && count * threads <= MOST) {
            pthread_t ids[threads];
            struct share shares[threads];
            peer.sin_port = htons(port);
            pthread_barrier_init(&barrier, NULL, threads + 1);
            for (int t = 0; t < threads; t++) {
                shares[t] = (struct share){t * count, count};
                pthread_create(&ids[t], NULL, work, &shares[t]);
            }
            long began = now();
            pthread_barrier_wait(&barrier);
            for (int t = 0; t < threads; t++) pthread_join(ids[t], NULL);
            printf("%ld\n", now() - began);
            pthread_barrier_destroy(&barrier);
            print(turns, count * threads);
            print(connects, count * threads);
        } else {
            return 2;
        }
        fflush(stdout);
    }
    return 0;
}
