//! A store node in a process of its own, which comes back at the same address.

use std::{
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use aether_testkit::bucket::{BUCKET, Bucket, KEY, SECRET, free_ports};

use crate::TERMS;

pub(crate) struct Node {
    folder: PathBuf,
    endpoint: String,
    durability: &'static str,
    listen: SocketAddr,
    http: SocketAddr,
    child: Option<Child>,
}

impl Node {
    pub(crate) fn new(folder: PathBuf, bucket: &Bucket, durability: &'static str) -> Self {
        let [listen, http] = free_ports().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        Self { folder, endpoint: bucket.endpoint(), durability, listen, http, child: None }
    }

    pub(crate) fn uri(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// Starts it, and does not wait for it.
    pub(crate) fn start(&mut self) {
        assert!(self.child.is_none(), "it runs");
        std::fs::create_dir_all(&self.folder).unwrap();
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.folder.with_extension("log")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_aether-store-node"))
            .args(["--listen", &self.listen.to_string(), "--http", &self.http.to_string()])
            .args(["--s3-bucket", BUCKET, "--s3-prefix", "cluster/one", "--s3-endpoint", &self.endpoint])
            .args(TERMS)
            .args(["--durability", self.durability])
            .args(["--gc-interval", "off", "--gc-waste", "0", "--cache-limit", "64Mi", "--data-dir"])
            .arg(&self.folder)
            .envs([("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AETHER_LOG", "info")])
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    pub(crate) fn wait_until_it_serves(&mut self) {
        let begin = Instant::now();
        while TcpStream::connect_timeout(&self.listen, Duration::from_secs(1)).is_err() {
            let child = self.child.as_mut().expect("it was started");
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "it ended: {ended:?}\n{}", self.log());
            assert!(begin.elapsed() < Duration::from_secs(60), "it does not serve\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As by a power cut of the process: nothing of it is told.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn lose_disk(&self) {
        assert!(self.child.is_none(), "its disk is in use");
        std::fs::remove_dir_all(&self.folder).unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.with_extension("log")).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let from = log.len().saturating_sub(4000);
            eprintln!("the end of the log of {}:\n{}", self.uri(), log.get(from..).unwrap_or(&log));
        }
    }
}
