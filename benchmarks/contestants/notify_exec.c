/* The least that a supervisor which sees every exec can do: what execs.py measures the guard against.
 *
 *   notify_exec COMMAND [ARGUMENT ...]
 *
 * runs COMMAND with execve() notified, and lets each go on. Per call: RECV, read the path, ID_VALID, SEND. No record.
 */
#include "notifying.h"

int main(int argc, char **argv) {
    int failed = argc < 2 ? 2 : start(__NR_execve, argv + 1);
    if (failed) return failed;
    struct seccomp_notif call;
    struct seccomp_notif_resp answer;
    while (receive(&call, &answer)) {
        char path[256];
        if (read_caller(&call, call.data.args[0], path, sizeof path) > 0) answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        else answer.error = -EFAULT;
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
    return 0;
}
