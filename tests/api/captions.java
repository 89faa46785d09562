import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.file.Files;
import java.nio.file.Path;

/** Posts the same body several times over one stock client, which offers h2c on http://; prints status and answer. */
class Captions {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .header("Content-Type", "application/json")
            .header("Authorization", "Bearer " + arguments[1])
            .POST(HttpRequest.BodyPublishers.ofFile(Path.of(arguments[2])))
            .build();
        for (int call = 0; call < Integer.parseInt(arguments[3]); call++) {
            HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.version() + " " + answer.body().replace("\n", "\\n"));
        }
    }
}
