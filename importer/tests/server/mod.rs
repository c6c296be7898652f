//! A web server for one bare repository behind a password, on a thread of the test: git's "dumb" protocol needs no more
//! than files.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};

use base64::Engine;

pub(crate) struct Server {
    address: SocketAddr,
}

impl Server {
    /// Serves the files of `repository` as `/repository.git`. Its thread ends with the test's process.
    pub(crate) fn start(repository: PathBuf, username: &str, password: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let address = listener.local_addr().expect("it is bound");
        let token = base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away early is its own business.
                let _ = answer(stream, &repository, &token);
            }
        });
        Self { address }
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }
}

fn answer(mut stream: TcpStream, repository: &Path, token: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let mut authorized = false;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        authorized |= line.to_lowercase().starts_with("authorization: basic ") && line.ends_with(token);
    }
    let target = request.split(' ').nth(1).unwrap_or_default().split('?').next().unwrap_or_default();
    let respond = |stream: &mut TcpStream, status: &str, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\nWWW-Authenticate: Basic realm=\"git\"\r\n\r\n",
            body.len()
        )?;
        stream.write_all(body)
    };
    if !authorized {
        return respond(&mut stream, "401 Unauthorized", b"");
    }
    let file = target
        .strip_prefix("/repository.git/")
        .map(PathBuf::from)
        .filter(|path| path.components().all(|part| matches!(part, Component::Normal(_))));
    match file.and_then(|file| std::fs::read(repository.join(file)).ok()) {
        Some(body) => respond(&mut stream, "200 OK", &body),
        None => respond(&mut stream, "404 Not Found", b""),
    }
}
