//! Running the binary.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};

use serde_json::Value;

/// The binary with none of the variables that would change what it does.
pub fn sparseserve(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sparseserve"));
    for (name, _) in std::env::vars() {
        if name.starts_with("SPARSESERVE_") || name.starts_with("HF_") || name == "RUST_BACKTRACE" {
            command.env_remove(name);
        }
    }
    command.args(arguments).current_dir(std::env::temp_dir()).stdin(Stdio::null());
    command
}

/// Runs to the end.
pub fn output(arguments: &[&str]) -> Output {
    sparseserve(arguments).output().unwrap()
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// A server of its own, on a free port.
pub struct Serving {
    process: Child,
    stderr: BufReader<ChildStderr>,
    pub url: String,
    client: reqwest::blocking::Client,
}

impl Serving {
    pub fn start(arguments: &[&str]) -> Self {
        let all = [&["serve", "--port", "0"], arguments].concat();
        let mut process = sparseserve(&all).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let mut screen = String::new();
        let url = loop {
            let start = screen.len();
            assert!(stderr.read_line(&mut screen).unwrap() > 0, "it ended early:\n{screen}");
            if let Some(url) = screen[start..].trim().strip_prefix("listening on ") {
                break url.to_string();
            }
        };
        let client = reqwest::blocking::Client::builder().no_proxy().timeout(None).build().unwrap();
        let serving = Serving { process, stderr, url, client };
        while serving.client.get(format!("{}/ready", serving.url)).send().unwrap().status() != 200 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        serving
    }

    /// The answer to a completions request, which must succeed.
    pub fn complete(&self, body: &Value) -> Value {
        let response = self.client.post(format!("{}/v1/completions", self.url)).json(body).send().unwrap();
        let (status, text) = (response.status(), response.text().unwrap());
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    pub fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    /// Waits for the end; what it said since it listens.
    pub fn end(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        std::io::Read::read_to_string(&mut self.stderr, &mut said).unwrap();
        (self.process.wait().unwrap(), said)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.process.kill();
    }
}
