//! A real ssh server: Debian's, as an ordinary process on a free port, with keys of its own.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// The program refuses to start by any other name than its whole path.
const PROGRAM: &str = "/usr/sbin/sshd";
/// Where it confines its unprivileged part when root runs it; its service makes this at each boot.
const CONFINEMENT: &str = "/run/sshd";

/// That directory for as long as a server needs it.
struct Confinement;

/// How many servers need it, and whether it is here for their sake alone.
static CONFINED: Mutex<(usize, bool)> = Mutex::new((0, false));

impl Confinement {
    fn make() -> Self {
        let mut confined = CONFINED.lock().unwrap_or_else(PoisonError::into_inner);
        if confined.0 == 0 {
            confined.1 = match fs::create_dir(CONFINEMENT) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                made => made.map(|()| true).unwrap(),
            };
        }
        confined.0 += 1;
        Self
    }
}

impl Drop for Confinement {
    fn drop(&mut self) {
        let mut confined = CONFINED.lock().unwrap_or_else(PoisonError::into_inner);
        confined.0 -= 1;
        if *confined == (0, true) {
            let _ = fs::remove_dir(CONFINEMENT);
        }
    }
}

/// A running server; ends when dropped.
pub struct Sshd {
    process: Child,
    _confinement: Option<Confinement>,
    directory: TempDir,
    address: SocketAddr,
    user: String,
}

impl Sshd {
    /// Lets in whoever has the key [`Sshd::private_key`] as the user who runs the test.
    ///
    /// # Panics
    /// When that does not work.
    pub fn start() -> Self {
        Self::start_at(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// The same at another address of this machine.
    ///
    /// # Panics
    /// When that does not work.
    pub fn start_at(address: IpAddr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["host", "user"] {
            key(&at(name));
        }
        let user = output(Command::new("id").arg("-un"));
        let confinement = (user == "root").then(Confinement::make);
        // Free a moment ago; the server itself cannot be asked to choose one.
        let address = TcpListener::bind((address, 0)).unwrap().local_addr().unwrap();
        let config = format!(
            "ListenAddress {address}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nUsePAM no\nStrictModes no\n\
             PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n",
            at("host").display(),
            at("user.pub").display()
        );
        fs::write(at("config"), config).unwrap();
        let log = File::create(at("log")).unwrap();
        let process = Command::new(PROGRAM)
            .args(["-D", "-e", "-f"])
            .arg(at("config"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("Debian's openssh-server is installed (e2e/third-party/build-packages.sh)");
        let mut server = Self { process, _confinement: confinement, directory, address, user };
        server.wait();
        server
    }

    /// Waits until it greets.
    fn wait(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let greeting = TcpStream::connect(self.address).and_then(|stream| {
                stream.set_read_timeout(Some(Duration::from_secs(10)))?;
                let mut greeting = String::new();
                BufReader::new(stream).read_line(&mut greeting).map(|_| greeting)
            });
            if greeting.is_ok_and(|greeting| greeting.starts_with("SSH-2.0-")) {
                return;
            }
            let ended = self.process.try_wait().unwrap();
            let log = || fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            assert!(ended.is_none() && Instant::now() < deadline, "sshd does not serve: {ended:?}: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The address of a directory.
    pub fn url(&self, path: &Path) -> String {
        format!("ssh://{}@{}{}", self.user, self.address, path.display())
    }

    /// The key that is let in.
    ///
    /// # Panics
    /// When the file is gone.
    pub fn private_key(&self) -> String {
        fs::read_to_string(self.directory.path().join("user")).unwrap()
    }

    /// The line of `known_hosts` by which this server is known.
    ///
    /// # Panics
    /// When the file is gone.
    pub fn known_hosts(&self) -> String {
        self.known_by(&fs::read_to_string(self.directory.path().join("host.pub")).unwrap())
    }

    /// The line by which a server of that public key would be known at this address.
    pub fn known_by(&self, public_key: &str) -> String {
        format!("[{}]:{} {public_key}", self.address.ip(), self.address.port())
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Makes a key at `path`, and its public half at `path.pub`.
///
/// # Panics
/// When that does not work.
pub fn key(path: &Path) {
    output(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path));
}

/// Gives the key at `path` a passphrase.
///
/// # Panics
/// When that does not work.
pub fn lock(path: &Path, passphrase: &str) {
    output(Command::new("ssh-keygen").args(["-q", "-p", "-P", "", "-N", passphrase, "-f"]).arg(path));
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
