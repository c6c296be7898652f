//! Holds the connection to the kernel and every question that is not answered, and keeps a server running.
//!
//! Requests go from `/dev/fuse` to the server over a socket, answers go back. When the server dies, the next one gets
//! the questions that it left: a reader that was blocked across the kill gets its bytes. (The kernel could repeat them
//! by itself, by `FUSE_NOTIFY_RESEND`, since Linux 6.9; who stands between needs nothing of the kernel.)
//!
//! Nobody waits for ever: who was killed while he waited is let go at once, a question that no server has answered
//! within the limit is answered with EIO, and a server that had all of that time is replaced. Nothing here waits for a
//! server to read: that is done by a thread of each server's own.
//!
//! The kernel wants every open of an inode to name the same backing file as long as one is open, whichever server
//! answered. So the exchange counts what is open and tells it to a new server.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, IoSlice, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
    recv, send, sendmsg, shutdown, socketpair,
};

use crate::lock;
use crate::protocol::{self, Answer, Request};
use crate::server;

/// Between the end of a server and the start of the next; doubled while they end without having answered anything.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How often readers that were killed are looked for.
const LOOK: Duration = Duration::from_millis(50);

/// Starts servers.
pub trait Launch: Send + 'static {
    /// Starts a server on `socket` ([`server::serve`]) and returns what waits for its end, after the socket broke.
    ///
    /// # Errors
    /// When it cannot be started; it is tried again.
    fn launch(&mut self, socket: OwnedFd) -> io::Result<Box<dyn FnOnce() -> String + Send>>;
}

/// A connection to the kernel that outlives its servers. Ends when the file system is unmounted everywhere.
pub struct Exchange {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    device: OwnedFd,
    limit: Duration,
    state: Mutex<State>,
    /// Something is outstanding, or the end has come.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    outstanding: BTreeMap<u64, Outstanding>,
    /// Opens that were answered before the server did, and their inodes.
    abandoned: HashMap<u64, u64>,
    opens: HashMap<u64, Opens>,
    server: Option<Arc<Running>>,
    ended: bool,
    /// Questions that a server has answered.
    answers: u64,
}

struct Outstanding {
    packet: Bytes,
    opcode: u32,
    node: u64,
    pid: u32,
    since: Instant,
    interrupted: bool,
}

/// What the kernel has open of one inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Opens {
    /// The file that the kernel reads by itself; 0 if it asks the server.
    pub(crate) backing: u32,
    pub(crate) count: u32,
}

impl Exchange {
    /// Greets the kernel on a connection that [`mount`](crate::mount()) made, and serves it from now on. A question that no
    /// server answers within `limit` gets EIO.
    ///
    /// # Errors
    /// When the kernel and we cannot agree, or no thread can be had.
    pub fn start(device: OwnedFd, limit: Duration, launch: impl Launch) -> io::Result<Self> {
        server::greet(device.try_clone()?)?;
        let shared = Arc::new(Shared { device, limit, state: Mutex::default(), changed: Condvar::new() });
        let spawn = |name: &str, work: Box<dyn FnOnce(&Shared) + Send>| {
            let shared = shared.clone();
            thread::Builder::new().name(name.into()).spawn(move || work(&shared))
        };
        let threads = vec![
            spawn("lazy-requests", Box::new(|shared| shared.requests()))?,
            spawn("lazy-servers", Box::new(|shared| shared.servers(launch)))?,
            spawn("lazy-limits", Box::new(|shared| shared.limits()))?,
        ];
        Ok(Self { shared, threads })
    }

    /// Whether the file system is no longer mounted anywhere.
    pub fn has_ended(&self) -> bool {
        self.shared.lock().ended
    }

    /// Waits until the file system is no longer mounted anywhere and its server has ended.
    pub fn join(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// From the kernel to the server.
    fn requests(&self) {
        let mut buffer = vec![0; protocol::BUFFER];
        loop {
            let length = match rustix::io::read(&self.device, &mut buffer) {
                Ok(length) => length,
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(error) => {
                    if error != Errno::NODEV {
                        tracing::error!(%error, "the kernel's side of the lazy layer");
                    }
                    return self.end();
                }
            };
            let Some(request) = Request::parse(&buffer[..length]) else { continue };
            match request.opcode {
                // The server keeps nothing that could be forgotten.
                protocol::FORGET | protocol::BATCH_FORGET => {}
                protocol::INTERRUPT => self.interrupt(request.target),
                _ => self.ask(&request, Bytes::copy_from_slice(&buffer[..length])),
            }
        }
    }

    fn ask(&self, request: &Request, packet: Bytes) {
        let outstanding = Outstanding {
            packet: packet.clone(),
            opcode: request.opcode,
            node: request.node,
            pid: request.pid,
            since: Instant::now(),
            interrupted: false,
        };
        let mut state = self.lock();
        if state.outstanding.is_empty() {
            self.changed.notify_all();
        }
        state.outstanding.insert(request.unique, outstanding);
        // Else the next one gets it.
        if let Some(server) = &state.server {
            server.send(packet);
        }
    }

    /// Any signal interrupts a wait, but only one that kills ends it: programs do not expect EINTR of a file.
    fn interrupt(&self, target: u64) {
        let pid = {
            let mut state = self.lock();
            let Some(outstanding) = state.outstanding.get_mut(&target) else { return };
            outstanding.interrupted = true;
            outstanding.pid
        };
        if is_killed(pid) {
            self.refuse(target, libc::EINTR);
        }
    }

    /// Answers in the server's place.
    fn refuse(&self, unique: u64, errno: i32) {
        let mut state = self.lock();
        let Some(outstanding) = state.outstanding.remove(&unique) else { return };
        match outstanding.opcode {
            protocol::OPEN => {
                state.abandoned.insert(unique, outstanding.node);
            }
            protocol::RELEASE => state.released(outstanding.node),
            _ => {}
        }
        drop(state);
        let _ = rustix::io::write(&self.device, &protocol::refusal(unique, errno));
    }

    fn limits(&self) {
        let mut state = self.lock();
        loop {
            if state.ended {
                return;
            }
            if state.outstanding.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let late: Vec<u64> = state
                .outstanding
                .iter()
                .filter(|(_, question)| question.since.elapsed() > self.limit)
                .map(|(unique, _)| *unique)
                .collect();
            let interrupted: Vec<(u64, u32)> = state
                .outstanding
                .iter()
                .filter(|(_, question)| question.interrupted)
                .map(|(unique, question)| (*unique, question.pid))
                .collect();
            let stuck = state.server.clone().filter(|server| !late.is_empty() && server.since.elapsed() > self.limit);
            drop(state);
            if let Some(server) = stuck {
                tracing::error!(limit = ?self.limit, "the server does not answer; another one takes its place");
                server.disconnect();
            }
            for unique in late {
                tracing::error!(limit = ?self.limit, "no server has answered a reader within the limit: EIO");
                self.refuse(unique, libc::EIO);
            }
            for (unique, pid) in interrupted {
                if is_killed(pid) {
                    self.refuse(unique, libc::EINTR);
                }
            }
            thread::sleep(LOOK);
            state = self.lock();
        }
    }

    fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        if let Some(server) = state.server.take() {
            server.disconnect();
        }
        self.changed.notify_all();
    }

    /// Keeps a server running, and carries its answers to the kernel.
    fn servers(&self, mut launch: impl Launch) {
        let mut pause = FIRST_PAUSE;
        loop {
            if self.lock().ended {
                return;
            }
            let before = self.lock().answers;
            match self.one_server(&mut launch) {
                Ok(end) if self.lock().ended => tracing::debug!(end, "the server of the lazy layer ended"),
                Ok(end) => tracing::warn!(end, "the server of the lazy layer ended; readers wait for the next"),
                Err(error) => tracing::error!(%error, "cannot start a server of the lazy layer"),
            }
            let state = self.lock();
            pause = if state.answers > before { FIRST_PAUSE } else { (pause * 2).min(LONGEST_PAUSE) };
            let _ = self.changed.wait_timeout_while(state, pause, |state| !state.ended);
        }
    }

    fn one_server(&self, launch: &mut impl Launch) -> io::Result<String> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        self.hand_over(&ours)?;
        let wait = launch.launch(theirs)?;
        let server = Arc::new(Running::new(ours)?);
        if self.introduce(&server) {
            self.answers(&server);
        }
        {
            let mut state = self.lock();
            state.server = None;
            state.abandoned.clear();
        }
        server.disconnect();
        Ok(wait())
    }

    /// Sends the device, by which backing files are named to the kernel, and what is open.
    fn hand_over(&self, socket: &OwnedFd) -> io::Result<()> {
        let memory = rustix::fs::memfd_create("opens", MemfdFlags::CLOEXEC)?;
        let mut file = fs::File::from(memory.try_clone()?);
        for (node, opens) in &self.lock().opens {
            file.write_all(&node.to_ne_bytes())?;
            file.write_all(&opens.backing.to_ne_bytes())?;
            file.write_all(&opens.count.to_ne_bytes())?;
        }
        let descriptors = [self.device.as_fd(), memory.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(socket, &[IoSlice::new(b"opens")], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Greets the server in the kernel's name and gives it what the last one left, unless the end has come.
    fn introduce(&self, server: &Arc<Running>) -> bool {
        let mut state = self.lock();
        if state.ended {
            return false;
        }
        server.send(protocol::greeting().into());
        for question in state.outstanding.values() {
            server.send(question.packet.clone());
        }
        state.server = Some(server.clone());
        true
    }

    fn answers(&self, server: &Running) {
        let mut buffer = vec![0; protocol::BUFFER];
        loop {
            match receive(&server.socket, &mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(length) => self.answer(server, &buffer[..length]),
            }
        }
    }

    fn answer(&self, server: &Running, packet: &[u8]) {
        let Some(answer) = Answer::parse(packet) else { return };
        if answer.unique == 0 {
            // A notice; that the kernel has forgotten what it speaks of is no fault.
            let _ = rustix::io::write(&self.device, packet);
            return;
        }
        let (question, abandoned) = {
            let mut state = self.lock();
            let question = state.outstanding.remove(&answer.unique);
            state.answers += u64::from(question.is_some());
            (question, state.abandoned.remove(&answer.unique))
        };
        let opened = (answer.error == 0).then(|| protocol::opened(packet)).flatten();
        let take_back = |node: u64| {
            if let Some((handle, _)) = opened {
                server.send(protocol::release(node, handle).into());
            }
        };
        let Some(question) = question else {
            return abandoned.into_iter().for_each(take_back);
        };
        let delivered = rustix::io::write(&self.device, packet).is_ok();
        match question.opcode {
            protocol::OPEN if !delivered => take_back(question.node),
            protocol::OPEN => {
                let Some((_, backing)) = opened else { return };
                let backing = backing.unwrap_or_default();
                let mut state = self.lock();
                state.opens.entry(question.node).or_insert(Opens { backing, count: 0 }).count += 1;
            }
            protocol::RELEASE => self.lock().released(question.node),
            _ => {}
        }
    }
}

impl State {
    fn released(&mut self, node: u64) {
        if let Some(opens) = self.opens.get_mut(&node) {
            opens.count -= 1;
            if opens.count == 0 {
                self.opens.remove(&node);
            }
        }
    }
}

/// A server at work, as it is seen from here.
struct Running {
    socket: Arc<OwnedFd>,
    /// What it is to be told, in order.
    packets: mpsc::Sender<Bytes>,
    since: Instant,
}

impl Running {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let (packets, queue) = mpsc::channel::<Bytes>();
        let other_end = socket.clone();
        let work = move || {
            for packet in queue {
                if send(&other_end, &packet, SendFlags::NOSIGNAL).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("lazy-send".into()).spawn(work)?;
        Ok(Self { socket, packets, since: Instant::now() })
    }

    /// Never waits. What a server that has just died does not get, the next one is asked.
    fn send(&self, packet: Bytes) {
        let _ = self.packets.send(packet);
    }

    /// Ends the conversation, also for a server that neither reads nor answers.
    fn disconnect(&self) {
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match recv(socket, &mut *buffer, RecvFlags::empty()) {
            Ok((length, _)) => return Ok(length),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether a signal that kills waits for this thread; the kernel puts SIGKILL into every thread of a process that is
/// to die, whichever signal it was. Unknown for a thread of another PID namespace.
fn is_killed(pid: u32) -> bool {
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    let status =
        if pid == 0 { String::new() } else { fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default() };
    status.lines().any(|line| {
        let pending = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"));
        pending.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & KILL != 0))
    })
}
