//! Running one program and reading what it prints, as a backend must: interruptibly, bounded in
//! time and size, with nothing of the server's left open in the child.
//!
//! Called by src/root_key/command.rs alone, since what is read is a secret: the buffer wipes
//! itself and never grows. Whatever ends the call early (a cancel, the end of the session, too
//! much output, the time limit) kills the child's whole process group; only kill -9 of the backend
//! leaves grandchildren behind, the shell itself goes then too (PR_SET_PDEATHSIG).
//!
//! What is killed is also reaped here, grandchildren too: where the postmaster is process 1 of a
//! container, orphans become its children, and it takes one that a signal has ended for a backend
//! that has crashed (CleanupBackend in src/backend/postmaster/postmaster.c): it would end every
//! session of the server. So orphans go to this process while the command runs.

use std::ffi::{OsStr, c_int};
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use zeroize::Zeroizing;

use super::{hooks, session};

/// Bytes read at once.
const CHUNK: usize = 4096;
/// More than a pipe holds.
const LAST_CHUNKS: usize = 32;
/// Longest wait without a look at the interrupts: a signal that arrives just before poll() waits
/// that long, any other wakes it.
const SLICE: Duration = Duration::from_millis(100);
/// The same once the output has ended and only the exit is waited for, which wakes nobody.
const EXIT_SLICE: Duration = Duration::from_millis(5);
/// How long, and how often, the end of what was killed is looked for. It takes no time but for
/// processes that this user cannot signal, sudo among them, and those that hang in the kernel.
const REAP_LIMIT: Duration = Duration::from_secs(1);
const REAP_SLICE: Duration = Duration::from_millis(2);

/// Process group of the child that runs now, for the exit callback; 0 for none.
static RUNNING: AtomicI32 = AtomicI32::new(0);
/// Process that has registered the exit callback.
static KILLS_AT_EXIT: AtomicI32 = AtomicI32::new(0);

/// Why there is no output.
pub enum Failure {
    /// The shell could not be started.
    NotStarted(io::Error),
    /// It exited with this status, which is not 0.
    Exited(c_int),
    /// A signal ended it: its number and name.
    Signalled(c_int, String),
    /// The time limit passed.
    TimedOut,
    /// It printed more than it may.
    TooMuch,
    /// Its output could not be read.
    Unreadable(io::Error),
}

/// Runs `command` through the shell and returns what it printed on stdout, `max_bytes` at most.
/// What it prints on stderr goes to `hear`, chunk by chunk. A cancel of the statement raises.
pub fn output(
    command: &OsStr,
    limit: Duration,
    max_bytes: usize,
    mut hear: impl FnMut(&[u8]),
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let deadline = Instant::now() + limit;
    let mut running = Running::start(command)?;
    // The whole size at once: a vector that grows leaves copies of the secret behind.
    let mut printed = Zeroizing::new(Vec::with_capacity(max_bytes));
    let mut chunk = Zeroizing::new([0; CHUNK]);
    loop {
        pgrx::check_for_interrupts!();
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::TimedOut);
        }
        let slice = if running.stdout.is_some() {
            SLICE
        } else {
            EXIT_SLICE
        };
        let [out, err] = readable(
            [fd(running.stdout.as_ref()), fd(running.stderr.as_ref())],
            left.min(slice),
        );
        if out && let Some(count) = take(&mut running.stdout, &mut *chunk)? {
            if printed.len() + count > max_bytes {
                return Err(Failure::TooMuch);
            }
            printed.extend_from_slice(&chunk[..count]);
        }
        if err && let Some(count) = take(&mut running.stderr, &mut *chunk)? {
            hear(&chunk[..count]);
        }
        if running.stdout.is_none() && running.has_exited() {
            break;
        }
    }
    // What it said last. Something that it left behind may hold stderr open, or go on talking:
    // that is not awaited.
    for _ in 0..LAST_CHUNKS {
        if !readable([-1, fd(running.stderr.as_ref())], Duration::ZERO)[1] {
            break;
        }
        match take(&mut running.stderr, &mut *chunk)? {
            Some(count) => hear(&chunk[..count]),
            None => break,
        }
    }
    running.reap()?;
    Ok(printed)
}

/// The child, which leads a process group of its own. Dropped before `reap`: the group is killed.
struct Running {
    child: Child,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
}

impl Running {
    fn start(command: &OsStr) -> Result<Running, Failure> {
        let parent = session::process();
        if KILLS_AT_EXIT.swap(parent, Relaxed) != parent {
            hooks::at_exit(kill_running);
        }
        let mut shell = Command::new("/bin/sh");
        shell
            .arg("-c")
            .arg(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        // SAFETY: the closure runs between fork and exec and makes system calls only.
        unsafe { shell.pre_exec(leave_the_server) };
        adopt_orphans(true);
        let spawned = shell.spawn().inspect_err(|_| adopt_orphans(false));
        let mut child = spawned.map_err(Failure::NotStarted)?;
        RUNNING.store(group_of(&child), Relaxed);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        Ok(Running {
            child,
            stdout,
            stderr,
        })
    }

    /// Whether the child has ended. It stays a zombie, which keeps the number of its group from
    /// being given to another.
    fn has_exited(&self) -> bool {
        self.look().is_none_or(|info| {
            // SAFETY: waitid has filled it; 0 stands for nobody.
            unsafe { info.si_pid() != 0 }
        })
    }

    /// What there is to know of the child's end, without reaping it; None: there is no child.
    fn look(&self) -> Option<libc::siginfo_t> {
        // SAFETY: siginfo_t is plain C data; waitid writes it and WNOWAIT leaves the child alone.
        unsafe {
            let mut info: libc::siginfo_t = mem::zeroed();
            let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            let found = libc::waitid(libc::P_PID, self.child.id(), &mut info, flags);
            (found == 0).then_some(info)
        }
    }

    /// The end of a child that has exited. What it has left behind when it failed goes too; what a
    /// command leaves behind that succeeds is its own affair.
    fn reap(mut self) -> Result<(), Failure> {
        use std::os::unix::process::ExitStatusExt;
        let succeeded = self.look().is_some_and(|info| {
            // SAFETY: waitid has filled it.
            info.si_code == libc::CLD_EXITED && unsafe { info.si_status() } == 0
        });
        let group = group_of(&self.child);
        if !succeeded {
            kill_group(group);
        }
        let status = self.child.wait().map_err(Failure::Unreadable)?;
        RUNNING.store(0, Relaxed);
        if !succeeded {
            reap_group(group);
        }
        adopt_orphans(false);
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(()),
            (Some(code), _) => Err(Failure::Exited(code)),
            (None, signal) => {
                let signal = signal.unwrap_or(0);
                Err(Failure::Signalled(signal, signal_name(signal)))
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if RUNNING.swap(0, Relaxed) != 0 {
            end_group(group_of(&self.child));
            adopt_orphans(false);
        }
    }
}

fn group_of(child: &Child) -> libc::pid_t {
    libc::pid_t::try_from(child.id()).unwrap_or(0)
}

fn kill_running() {
    end_group(RUNNING.swap(0, Relaxed));
}

/// Has orphans of what this process starts become its children, or no longer. Not for the
/// postmaster, which would keep those that a command leaves behind.
fn adopt_orphans(adopt: bool) {
    // SAFETY: a static; an attribute of this process that no child inherits.
    unsafe {
        if pg_sys::IsUnderPostmaster {
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, libc::c_ulong::from(adopt));
        }
    }
}

fn end_group(group: libc::pid_t) {
    kill_group(group);
    reap_group(group);
}

fn kill_group(group: libc::pid_t) {
    if group > 1 {
        // SAFETY: signals the group of our own child, which is not reaped yet.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
}

/// Reaps what has been killed of a group, whose members may have no parent but this process by now.
fn reap_group(group: libc::pid_t) {
    let begin = Instant::now();
    while group > 1 && begin.elapsed() < REAP_LIMIT {
        // SAFETY: reaps children of this process, in that group only.
        match unsafe { libc::waitpid(-group, std::ptr::null_mut(), libc::WNOHANG) } {
            // None is left here; others, if any, have gone to process 1.
            -1 => return,
            0 => std::thread::sleep(REAP_SLICE),
            _ => {}
        }
    }
}

/// In the child: no descriptor of the server's, no signal ignored or blocked, and an end when the
/// server process ends.
fn leave_the_server() -> io::Result<()> {
    // SAFETY: plain system calls on this process, which has one thread and is about to exec.
    unsafe {
        for signal in 1..libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // Close on exec, not at once: std reports a failing exec through a descriptor of its own.
        let cloexec = libc::CLOSE_RANGE_CLOEXEC;
        if libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, cloexec) != 0 {
            // A kernel before 5.11: one by one.
            let mut limit: libc::rlimit = mem::zeroed();
            libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
            let last = c_int::try_from(limit.rlim_cur).unwrap_or(1 << 20);
            for descriptor in 3..last.min(1 << 20) {
                libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
    }
    Ok(())
}

fn fd(pipe: Option<&impl AsRawFd>) -> RawFd {
    pipe.map_or(-1, AsRawFd::as_raw_fd)
}

/// Which of two descriptors have something to read, or an end; -1 is none. Waits up to `limit`.
fn readable(descriptors: [RawFd; 2], limit: Duration) -> [bool; 2] {
    let mut polled = descriptors.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    let limit = c_int::try_from(limit.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: an array of two entries; a negative descriptor is skipped, EINTR leaves revents 0.
    unsafe { libc::poll(polled.as_mut_ptr(), 2, limit) };
    polled.map(|entry| entry.revents != 0)
}

/// Reads once what is there. None, and the pipe closed, at its end.
fn take(pipe: &mut Option<impl Read>, chunk: &mut [u8]) -> Result<Option<usize>, Failure> {
    let Some(open) = pipe else { return Ok(None) };
    match open.read(chunk) {
        Ok(0) => {
            *pipe = None;
            Ok(None)
        }
        Ok(count) => Ok(Some(count)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Some(0)),
        Err(error) => Err(Failure::Unreadable(error)),
    }
}

fn signal_name(signal: c_int) -> String {
    // SAFETY: returns a C string that lives until the next call; copied at once.
    unsafe {
        let name = libc::strsignal(signal);
        if name.is_null() {
            return String::new();
        }
        std::ffi::CStr::from_ptr(name)
            .to_string_lossy()
            .into_owned()
    }
}
