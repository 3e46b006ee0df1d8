//! Running the binary. Nothing here waits for ever: what hangs is killed, and its test fails.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Time for what takes seconds where all is well: to start, to end, to refuse.
pub const SOON: Duration = Duration::from_secs(60);
/// Time for what computes.
pub const LATER: Duration = Duration::from_secs(300);

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

/// Runs to the end, which must come in time.
pub fn output(arguments: &[&str]) -> Output {
    output_within(&mut sparseserve(arguments), LATER)
}

/// Runs `command` to the end, or kills it after `time` and panics.
pub fn output_within(command: &mut Command, time: Duration) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let id = child.id().to_string();
    let (tell, ended) = channel();
    std::thread::spawn(move || tell.send(child.wait_with_output()));
    match ended.recv_timeout(time) {
        Ok(output) => output.unwrap(),
        Err(_) => {
            // It has not been waited for yet, so its id is still its own.
            let _ = Command::new("kill").args(["-KILL", &id]).status();
            let output = ended.recv_timeout(SOON).unwrap().unwrap();
            panic!("{command:?} did not end within {time:?}: {}", text(&output.stderr));
        }
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn repository(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// A client that gives up in the end.
pub fn client() -> reqwest::blocking::Client {
    reqwest::blocking::Client::builder().no_proxy().timeout(LATER).build().unwrap()
}

/// A server of its own, on a free port.
pub struct Serving {
    process: Child,
    /// Its lines on standard error, from a thread that reads them.
    lines: Receiver<String>,
    /// What has been read of them.
    said: String,
    /// Dropped, the thread reads on.
    deaf: Option<Sender<()>>,
    pub url: String,
    client: reqwest::blocking::Client,
}

impl Serving {
    pub fn start(arguments: &[&str]) -> Self {
        let mut serving = Self::start_deaf(arguments);
        serving.deaf = None;
        serving
    }

    /// The same, where nobody reads standard error after the start screen.
    pub fn start_deaf(arguments: &[&str]) -> Self {
        let all = [&["serve", "--port", "0"], arguments].concat();
        let mut process = sparseserve(&all).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let (tell, lines) = channel();
        let (deaf, hearing) = channel::<()>();
        std::thread::spawn(move || {
            let mut heard_url = false;
            for line in stderr.lines().map_while(Result::ok) {
                let is_url = line.trim().starts_with("listening on ");
                let _ = tell.send(line);
                if is_url && !heard_url {
                    heard_url = true;
                    let _ = hearing.recv();
                }
            }
        });
        let (said, url) = (String::new(), String::new());
        let mut serving = Serving { process, lines, said, deaf: Some(deaf), url, client: client() };
        let line = serving.wait_for("listening on ");
        serving.url = line.trim().trim_start_matches("listening on ").to_owned();
        let start = Instant::now();
        while serving.client.get(format!("{}/ready", serving.url)).send().unwrap().status() != 200 {
            assert!(start.elapsed() < SOON, "it never is ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        serving
    }

    /// The first line from now on that contains `words`.
    pub fn wait_for(&mut self, words: &str) -> String {
        let start = Instant::now();
        loop {
            let left = SOON.saturating_sub(start.elapsed());
            let Ok(line) = self.lines.recv_timeout(left) else { panic!("no {words:?} in\n{}", self.said) };
            self.said += &line;
            self.said.push('\n');
            if line.contains(words) {
                return line;
            }
        }
    }

    /// The answer to a completions request, which must succeed.
    pub fn complete(&self, body: &Value) -> Value {
        let response = self.client.post(format!("{}/v1/completions", self.url)).json(body).send().unwrap();
        let (status, text) = (response.status(), response.text().unwrap());
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    pub fn get(&self, path: &str) -> reqwest::blocking::Response {
        self.client.get(format!("{}{path}", self.url)).send().unwrap()
    }

    pub fn signal(&self, name: &str) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    /// Waits for the end, which must come soon; what it said.
    pub fn end(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < SOON, "it does not end:\n{}", self.said);
            std::thread::sleep(Duration::from_millis(5));
        };
        self.deaf = None;
        while let Ok(line) = self.lines.recv_timeout(SOON) {
            self.said += &line;
            self.said.push('\n');
        }
        (status, std::mem::take(&mut self.said))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
