//! A real API server of Kubernetes with its etcd, as ordinary processes on free ports of loopback. There are neither controllers nor
//! nodes: what those would do, a test does itself. Whoever has the kubeconfig may do everything. It ends with its [`ControlPlane`].

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use rcgen::KeyPair;
use serde_json::json;
use tempfile::TempDir;

use crate::bucket::free_ports;

/// Alone on loopback, so no secret.
const TOKEN: &str = "of-no-use-elsewhere";
const PATIENCE: Duration = Duration::from_secs(60);

/// The two processes.
pub struct ControlPlane {
    /// In the order in which they are ended.
    processes: Vec<Child>,
    folder: TempDir,
    /// With all rights.
    pub client: Client,
}

/// The API server's program; builds it on a machine that has not got it, which takes minutes.
fn program() -> PathBuf {
    let script = Path::new(env!("AETHER_TOP")).join("e2e/third-party/kubernetes.sh");
    let output = Command::new(&script).output().unwrap();
    assert!(output.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()).join("kube-apiserver")
}

impl ControlPlane {
    /// Starts both, and waits until the API server is ready.
    ///
    /// # Panics
    /// When that does not work.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let [etcd, peer, server] = free_ports();
        let (etcd, peer) = (format!("http://127.0.0.1:{etcd}"), format!("http://127.0.0.1:{peer}"));
        let key = KeyPair::generate().unwrap();
        fs::write(at("accounts.key"), key.serialize_pem()).unwrap();
        fs::write(at("accounts.pub"), key.public_key_pem()).unwrap();
        fs::write(at("tokens"), format!("{TOKEN},admin,1,\"system:masters\"\n")).unwrap();
        let spawn = |name: &str, program: &Path, flags: &[(&str, String)]| {
            let log = fs::File::create(at(&format!("{name}.log"))).unwrap();
            let flags = flags.iter().map(|(flag, value)| format!("--{flag}={value}"));
            let mut command = Command::new(program);
            command.args(flags).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
            command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display()))
        };
        let members = format!("default={peer}");
        // Debian's etcd-server.
        let store = [
            ("data-dir", at("etcd")),
            ("listen-client-urls", etcd.clone()),
            ("advertise-client-urls", etcd.clone()),
            ("listen-peer-urls", peer.clone()),
            ("initial-advertise-peer-urls", peer),
            ("initial-cluster", members),
            ("unsafe-no-fsync", "true".into()),
            ("log-level", "error".into()),
        ];
        let api = [
            ("etcd-servers", etcd),
            ("bind-address", "127.0.0.1".into()),
            // Written into a Service that nobody uses here; loopback is refused.
            ("advertise-address", "192.0.2.1".into()),
            ("secure-port", server.to_string()),
            ("cert-dir", at("certificates")),
            ("service-cluster-ip-range", "10.96.0.0/24".into()),
            ("service-account-issuer", "https://kubernetes.default.svc".into()),
            ("service-account-key-file", at("accounts.pub")),
            ("service-account-signing-key-file", at("accounts.key")),
            ("token-auth-file", at("tokens")),
            ("authorization-mode", "AlwaysAllow".into()),
            // A controller would make the accounts that it wants.
            ("disable-admission-plugins", "ServiceAccount".into()),
        ];
        let program = tokio::task::spawn_blocking(program).await.unwrap();
        let mut processes = vec![spawn("etcd", Path::new("etcd"), &store)];
        processes.insert(0, spawn("kube-apiserver", &program, &api));
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": format!("https://127.0.0.1:{server}"), "insecure-skip-tls-verify": true}}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        // YAML is JSON too.
        fs::write(at("kubeconfig"), kubeconfig.to_string()).unwrap();
        let kubeconfig = Kubeconfig::from_yaml(&kubeconfig.to_string()).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
        let client = Client::try_from(config.unwrap()).unwrap();
        let mut started = Self { processes, folder, client };
        started.until_ready().await;
        started
    }

    async fn until_ready(&mut self) {
        let begun = Instant::now();
        loop {
            let ready = http::Request::get("/readyz").body(Vec::new()).unwrap();
            let Err(error) = self.client.request_text(ready).await else { return };
            let ended = self.processes.iter_mut().any(|process| process.try_wait().unwrap().is_some());
            if ended || begun.elapsed() > PATIENCE {
                let log = |name: &str| {
                    let log = fs::read(self.folder.path().join(name)).unwrap_or_default();
                    String::from_utf8_lossy(&log[log.len().saturating_sub(2000)..]).into_owned()
                };
                panic!("the API server is not ready: {error}\n{}\n{}", log("etcd.log"), log("kube-apiserver.log"));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// By which other programs reach it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
