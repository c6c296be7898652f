//! A real S3 service (SeaweedFS) in a process of its own, on loopback, with one bucket. It ends with its [`Bucket`].

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// The bucket that is there.
pub const BUCKET: &str = "aether";
/// The access key that may do everything.
pub const KEY: &str = "test";
/// Its secret.
pub const SECRET: &str = "of no use elsewhere";

/// The service.
pub struct Bucket {
    child: Child,
    s3: u16,
    /// What it leaves behind otherwise: one of a fixed name for each port.
    sockets: Vec<PathBuf>,
}

/// So many ports that were free a moment ago.
///
/// # Panics
/// When there are none.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let listeners: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    std::array::from_fn(|n| listeners[n].local_addr().unwrap().port())
}

/// The folder of `weed`; installs it on a machine that has not got it.
fn program() -> PathBuf {
    let script = Path::new(env!("AETHER_TOP")).join("e2e/third-party/seaweedfs.sh");
    let output = Command::new(&script).output().unwrap();
    assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()).join("weed")
}

impl Bucket {
    /// Starts the service with its files in `folder`. Ports that were free may be taken when they are wanted: it is started
    /// again with others then.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(folder: &Path) -> Self {
        let log = folder.join("seaweed.log");
        let started = (0..3).find_map(|_| Self::try_start(folder, &log));
        started.unwrap_or_else(|| panic!("the S3 service ended three times\n{}", end_of(&log)))
    }

    /// `None` when it ended.
    fn try_start(folder: &Path, log: &Path) -> Option<Self> {
        let identities = format!(
            r#"{{"identities":[{{"name":"aether","credentials":[{{"accessKey":"{KEY}","secretKey":"{SECRET}"}}],
            "actions":["Admin","Read","List","Tagging","Write"]}}]}}"#
        );
        let (data, identities_file) = (folder.join("seaweed"), folder.join("s3.json"));
        std::fs::create_dir_all(&data).unwrap();
        std::fs::write(&identities_file, identities).unwrap();
        let [master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc] = free_ports();
        let mut command = Command::new(program());
        command.args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-master.telemetry=false"]);
        // Small volumes, so that none of them takes the disk for itself; no services beside S3 on ports of their own.
        command.args(["-master.volumeSizeLimitMB=64", "-volume.max=100", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
        let mut sockets = Vec::new();
        for (option, port) in [
            ("master.port", master),
            ("master.port.grpc", master_grpc),
            ("volume.port", volume),
            ("volume.port.grpc", volume_grpc),
            ("filer.port", filer),
            ("filer.port.grpc", filer_grpc),
            ("s3.port", s3),
            ("s3.port.grpc", s3_grpc),
        ] {
            command.arg(format!("-{option}={port}"));
            sockets.push(
                format!("/tmp/seaweedfs-{}-{port}.sock", option.replacen(".port", "", 1).replace('.', "-")).into(),
            );
        }
        command.arg(format!("-dir={}", data.display())).arg(format!("-s3.config={}", identities_file.display()));
        let out = std::fs::File::create(log).unwrap();
        let child = command.stdout(out.try_clone().unwrap()).stderr(out).stdin(Stdio::null()).spawn().unwrap();
        let mut bucket = Self { child, s3, sockets };
        let begin = Instant::now();
        // S3 refuses who does not sign: then it is there. A bucket is a folder of the filer.
        let ready = || http("GET", s3, "/").contains("403") && http("POST", filer, "/buckets/aether/").contains("201");
        while !ready() {
            if bucket.child.try_wait().unwrap().is_some() {
                return None;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "the S3 service did not start\n{}", end_of(log));
            std::thread::sleep(Duration::from_millis(200));
        }
        Some(bucket)
    }

    /// Where it is.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.s3)
    }
}

impl Drop for Bucket {
    fn drop(&mut self) {
        // It takes its time to end by itself, and its data goes anyway.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for socket in &self.sockets {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// The last lines of a log.
fn end_of(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4000)..]).into_owned()
}

/// The first line of the answer to a request, or nothing.
fn http(method: &str, port: u16, path: &str) -> String {
    let ask = || -> std::io::Result<String> {
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(connection, "{method} {path} HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer.lines().next().unwrap_or_default().to_owned())
    };
    ask().unwrap_or_default()
}
