/* The least that a notification supervisor for connect() can do: what connect.py measures the guard against.
 *
 *   notify PORT COMMAND [ARGUMENT ...]
 *
 * runs COMMAND with connect() notified, and connects on its behalf to 127.0.0.1:PORT alone. Per call: RECV, read the
 * address, ID_VALID, pidfd_getfd, connect, close, SEND. No accounting, no record, no timeout, one thread: not a sandbox.
 */
#include "notifying.h"
#include <arpa/inet.h>
#include <stdlib.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    in_port_t allowed = htons(atoi(argv[1]));
    int failed = start(__NR_connect, argv + 2);
    if (failed) return failed;
    struct seccomp_notif call;
    struct seccomp_notif_resp answer;
    while (receive(&call, &answer)) {
        struct sockaddr_in address;
        size_t length = call.data.args[2] < sizeof address ? call.data.args[2] : sizeof address;
        if (read_caller(&call, call.data.args[1], &address, length) != sizeof address || address.sin_family != AF_INET ||
            address.sin_addr.s_addr != htonl(INADDR_LOOPBACK) || address.sin_port != allowed) {
            answer.error = -EACCES;
        } else {
            int s = syscall(SYS_pidfd_getfd, pidfd, (int)call.data.args[0], 0);
            answer.error = s < 0 ? -errno : connect(s, (struct sockaddr *)&address, sizeof address) ? -errno : 0;
            close(s);
        }
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
    return 0;
}
