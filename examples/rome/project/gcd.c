#include <stdio.h>
#include <stdlib.h>

static long gcd(long a, long b) { return b ? gcd(b, a % b) : labs(a); }

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: %s A B\n", argv[0]);
        return 2;
    }
    printf("%ld\n", gcd(atol(argv[1]), atol(argv[2])));
    return 0;
}
