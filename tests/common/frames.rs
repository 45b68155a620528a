//! Serve calls made by hand, frame by frame.

use bytes::Bytes;

use super::Dispatcher;

pub const SERVE: &str = "/collector.CollectiveDispatcher/Serve";
pub const GRPC: (&str, &str) = ("content-type", "application/grpc");

/// Length-prefixed as gRPC has it.
pub fn framed(compressed: u8, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![compressed];
    frame.extend(length.to_be_bytes());
    frame.extend(payload);
    frame
}

pub fn message(payload: &[u8]) -> Vec<u8> {
    framed(0, payload.len() as u32, payload)
}

/// A Serve call begun by hand, alone on its connection, which ends when it is dropped.
pub struct Begun {
    pub response: h2::client::ResponseFuture,
    _send: h2::SendStream<Bytes>,
    _client: h2::client::SendRequest<Bytes>,
}

/// Sends `message`, the whole of it or, unless it is the `end`, the beginning.
pub async fn begin(
    dispatcher: &Dispatcher,
    connection: &h2::client::Builder,
    message: Vec<u8>,
    end: bool,
) -> Begun {
    let stream = tokio::net::TcpStream::connect(dispatcher.address()).await.unwrap();
    let (client, connection) = connection.handshake(stream).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let request = http::Request::post(format!("http://{}{SERVE}", dispatcher.address()))
        .header(GRPC.0, GRPC.1)
        .body(())
        .unwrap();
    let (response, mut send) = client.send_request(request, false).unwrap();
    // The server may well refuse before it has all of it.
    let _ = send.send_data(message.into(), end);
    Begun { response, _send: send, _client: client }
}
